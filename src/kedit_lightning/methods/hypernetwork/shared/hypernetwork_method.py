"""The base of hypernetworks: their settings, the edited projections, and training episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.blocks import Block
from kedit_lightning.edits import Edit, LowRankEdit
from kedit_lightning.edits.projections import check_editable, compute_dtype, projection_shape
from kedit_lightning.methods.capabilities import Count, CountOrZero
from kedit_lightning.methods.hypernetwork.shared.editor_network import (
    ProjectionPlan,
    bytes_of_edit,
    edits_from_gradients,
)
from kedit_lightning.methods.hypernetwork.shared.meta_gradient import MetaGradient, meta_gradient
from kedit_lightning.methods.method import Capabilities, Need
from kedit_lightning.methods.shared.answer_passes import encoded_answers
from kedit_lightning.methods.shared.row_memory import requests_at_a_time
from kedit_lightning.methods.training.episodes import (
    Episode,
    make_episodes,
    probes_of,
    with_unlikelihood,
)
from kedit_lightning.methods.training.trained_method import TrainedMethod, TrainedSettings
from kedit_lightning.methods.training.trained_network import TrainedNetwork
from kedit_lightning.requests import EditBatch, EditExample, EditRequest


@dataclass(frozen=True)
class HypernetworkSettings(TrainedSettings):
    """Settings of :class:`HypernetworkMethod`."""

    layers: list[int] | None
    modules: list[str] | None
    n_edits: Count
    at_once: Count | None
    n_rephrases: CountOrZero
    own_wording: bool
    n_locality: CountOrZero
    unlikelihood: bool


class HypernetworkMethod(TrainedMethod):
    """Trains a hypernetwork on episodes: edits of the base model, judged by an outer loss.

    Args:
        base_model: The model to edit.
        layers: Blocks whose projections are edited; negative numbers count from the end. If absent,
            those of the checkpoint, or else the method's number of last blocks with an MLP.
        modules: Names of the projections to edit instead of those of ``layers``.
        n_edits: Examples that one edit writes in training.
        at_once: Largest number of edits of a training step that run through the model together;
            all of them if absent. Fewer take less memory and give the same step.
        n_rephrases: Rephrases of an example in an episode; the next ones in each epoch.
        own_wording: Add the request's own prompt to the rephrases.
        n_locality: Locality probes of an example in an episode; the next ones in each epoch.
        unlikelihood: Learn all answers of probes whose task is against some, such as opinions, and
            make those that it is against unlikely: -log(1 - p) is added to the edit loss, p the
            geometric mean of the probabilities of an answer's tokens.
        **settings: The settings of :class:`TrainedMethod`.
    """

    can: ClassVar[Capabilities] = Capabilities(adapter=True, weights=True, images=True)
    needs_to_fit: ClassVar[frozenset[Need]] = frozenset({"rephrases", "locality"})
    learns: ClassVar[str] = "a hypernetwork that turns gradients into edits"
    plan_type: ClassVar[type[ProjectionPlan]]
    #: The class of the method's networks: of plan, shapes, settings and dtype.
    network_type: ClassVar[Callable[..., TrainedNetwork]]
    #: Number of blocks at the end of a model that are edited by default.
    last_blocks: ClassVar[int] = 3
    #: The same of each half of an encoder-decoder, as MEND's paper edits T5 and BART.
    last_blocks_of_half: ClassVar[int] = 2

    settings: HypernetworkSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        modules: list[str] | None = None,
        n_edits: int = 1,
        at_once: int | None = None,
        n_rephrases: int = 1,
        own_wording: bool = False,
        n_locality: int = 1,
        unlikelihood: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, **settings)
        self.fit_batch_size = n_edits

    # ---- building

    def projections_of(self, block: Block) -> Sequence[str]:
        """Names of the projections of a block that are edited, unless modules are named."""
        return block.projections

    def default_modules(self) -> tuple[str, ...]:
        """Names of the edited projections without a checkpoint, those of an encoder first."""
        if self.settings.modules is not None:
            return tuple(dict.fromkeys(self.settings.modules))
        base, layers = self.base, self.settings.layers
        halves = [base.layout.encoder, base.layout] if base.is_encoder_decoder else [base.layout]
        last = self.last_blocks_of_half if base.is_encoder_decoder else self.last_blocks
        names = [
            name
            for half in halves
            for i in (half.dense_layers[-last:] if layers is None else layers)
            for name in self.projections_of(half.block(i))
        ]
        return tuple(dict.fromkeys(names))

    def default_plan(self) -> ProjectionPlan:
        """The architecture that the method has unless settings say otherwise."""
        return self.plan_type(self.default_modules())

    def plan(self, saved: ProjectionPlan | None = None) -> Any:
        """The architecture that the settings ask for; see the base class."""
        plan: ProjectionPlan = super().plan(saved)
        chosen = self.settings.modules is not None or self.settings.layers is not None
        if chosen or self.chooses_projections:
            return replace(plan, modules=self.default_modules())
        return plan

    @property
    def chooses_projections(self) -> bool:
        """Whether the settings choose projections of a block, and override a checkpoint's."""
        return False

    def shapes_of(self, modules: Sequence[str]) -> list[tuple[int, int]]:
        """``(d_in, d_out)`` of projections.

        Raises:
            UnsupportedUseError: A projection cannot be edited.
        """
        return [projection_shape(check_editable(self.base.model, name)) for name in modules]

    def create(self, plan: Any) -> TrainedNetwork:
        """Untrained networks of an architecture.

        Raises:
            UnsupportedUseError: A projection cannot be edited.
        """
        shapes, dtype = self.shapes_of(plan.modules), compute_dtype(self.base.dtype)
        return self.network_type(plan, shapes, self.settings, dtype)

    # ---- editing and training

    def asked(self, requests: Sequence[EditRequest]) -> Sequence[EditRequest]:
        """The requests as their gradients are taken."""
        return requests

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One gradient of the requests, mapped to an edit by the networks."""
        return self._edits([requests])[0]

    def together(self, requests: Sequence[EditRequest]) -> int:
        """Number of requests whose edits fit into memory together, at least 1."""
        rows = encoded_answers(self.base, self.asked(requests))
        tokens = max(len(row.prompt) + len(row.answer) for row in rows)
        own = bytes_of_edit(self.network, self.shapes_of(self.network.plan.modules), tokens)
        return requests_at_a_time(self.base, 0, [[row] for row in rows], own)

    def edits_together(self, requests: Sequence[EditRequest]) -> Sequence[Edit]:
        """The edit of each request, as it is without the others."""
        return self._edits([[request] for request in requests])

    def _edits(self, groups: Sequence[Sequence[EditRequest]]) -> list[LowRankEdit]:
        origins = [self.prepare_edit(group) for group in groups]
        asked = [self.asked(group) for group in groups]
        return edits_from_gradients(self.base, self.network, asked, origins)

    def batch_gradients(self, batch: EditBatch) -> Iterator[MetaGradient]:
        """The meta-gradient of a batch of episodes, over all ranks."""
        episodes, at_once = self.episodes(batch), self.settings.at_once
        yield meta_gradient(self.base, self.network, episodes, self.loss_weights, at_once)

    @property
    def loss_weights(self) -> tuple[float, float]:
        """Weights of the edit loss and of the locality loss."""
        return 1.0, 1.0

    def draw_episodes(self, examples: Sequence[EditExample], size: int) -> list[Episode]:
        """The episodes of this epoch, ``size`` examples each."""
        s = self.settings
        counts = s.n_rephrases, s.n_locality
        drawn = make_episodes(examples, size, self.epoch, s.start, *counts, s.own_wording)
        return [with_unlikelihood(one) for one in drawn] if s.unlikelihood else drawn

    def episodes(self, batch: EditBatch) -> list[Episode]:
        """The episodes of a batch, ``n_edits`` examples each."""
        return self.draw_episodes(self.examples_of(batch), self.settings.n_edits)

    def check_examples(self, examples: Sequence[EditExample], fitting: bool = False) -> None:
        """Make sure that each example has rephrases, and that some have locality probes.

        Raises:
            MissingNeedsError: Names every example that lacks something, and the field.
        """
        if fitting and probes_of(examples, "locality"):
            examples = [e for e in examples if not probes_of([e], "rephrase")]
        super().check_examples(examples, fitting)
