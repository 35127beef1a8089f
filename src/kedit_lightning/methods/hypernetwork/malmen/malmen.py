"""MALMEN: a hypernetwork that edits thousands of facts together, by one ridge regression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.layout import Block
from kedit_lightning.edits import Edit
from kedit_lightning.methods.hypernetwork.shared.hypernetwork_method import (
    HypernetworkMethod,
    HypernetworkSettings,
)
from kedit_lightning.methods.hypernetwork.shared.meta_gradient import MetaGradient
from kedit_lightning.methods.hypernetwork.shared.parameter_shift import (
    compute_shift_edit,
    training_shifts,
)
from kedit_lightning.methods.hypernetwork.shared.shift_gradient import (
    WeightedEpisodes,
    shift_gradient,
)
from kedit_lightning.methods.hypernetwork.shared.value_networks import (
    Projections,
    ShiftSettings,
    ShiftSize,
    Tokens,
    ValueNetworks,
    ValuePlan,
    projections_of,
)
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.requests import EditBatch, EditRequest


@dataclass(frozen=True)
class MALMENSettings(ShiftSettings, HypernetworkSettings):
    """Settings of :class:`MALMEN`."""


class MALMEN(HypernetworkMethod):
    """MALMEN, from "Massive Editing for Large Language Models via Meta Learning" (Tan et al. 2024).

    ``fit`` trains small networks that map the gradient at each token of a request to a value
    difference: how the output of an edited projection is to change there. One ridge regression for
    each projection aggregates the value differences of all requests, so that edits do not cancel
    each other as sums of separate edits do. Requests run in minibatches, and the memory of a device
    does not grow with their number.

    Differences from the released code: rates and ridges are learned as logarithms, in a group of
    their own; the loss is the mean over examples, whatever the minibatches; statistics do not
    change while edits are computed; several processes write the requests of all of them together.

    By default the last six blocks are edited.

    Args:
        base_model: The model to edit.
        projections: The edited MLP projections of a block: ``down``, the one that writes into the
            residual stream, ``up``, those that read it, or ``all``. The checkpoint's, or else
            ``down``.
        tokens: Tokens of a request that give keys: those that predict its ``answer``, or ``all``.
            The checkpoint's, or else ``answer``.
        shift_size: What ``ridge`` penalises: the squared ``norm`` of a shift, as published, or its
            mean squared effect on the ``keys`` of the fit's requests and probes, with which later
            edits disturb earlier ones less. Text behind an answer gives no keys, so with large
            edits check that free answers still end well. Both are the same before a fit. The
            checkpoint's, or else ``norm``.
        rank: Largest rank of a network's matrices. The checkpoint's, or else 1920.
        blocks: Residual blocks of each network. The checkpoint's, or else 2.
        shared: One network for all projections of the same shape, rather than one each. The
            checkpoint's, or else true.
        normalise: Normalise the factors with running statistics.
        lr_lr: Learning rate of the logarithms of ``edit_lr`` and ``ridge``.
        edit_lr: Initial learning rate of the value differences, one number a projection.
        ridge: Initial weight of the penalty of a shift, one number a projection.
        c_edit: Weight of the edit loss.
        c_loc: Weight of the locality loss.
        n_edits: Examples that one edit writes in training.
        at_once: Most examples that run through the model together, in training and in editing.
        clip: Largest norm of the gradient of a training step.
        **settings: The settings of :class:`HypernetworkMethod`.
    """

    learns: ClassVar[str] = "a hypernetwork that turns gradients into wanted changes of outputs"
    last_blocks: ClassVar[int] = 6
    settings_type: ClassVar[type[MethodSettings]] = MALMENSettings
    plan_type = ValuePlan
    network_type = ValueNetworks

    settings: MALMENSettings
    network: ValueNetworks

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        projections: Projections | None = None,
        tokens: Tokens | None = None,
        shift_size: ShiftSize | None = None,
        rank: int | None = None,
        blocks: int | None = None,
        shared: bool | None = None,
        normalise: bool = True,
        lr_lr: float = 1e-3,
        edit_lr: float = 1e-6,
        ridge: float = 1.0,
        c_edit: float = 1.0,
        c_loc: float = 1.0,
        n_edits: int = 512,
        at_once: int = 32,
        clip: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, n_edits=n_edits, at_once=at_once, clip=clip, **settings)

    # ---- building

    @property
    def chooses_layers(self) -> bool:
        """Whether the settings choose layers or projections of them."""
        return self.settings.layers is not None or self.settings.projections is not None

    def projections_of(self, block: Block) -> Sequence[str]:
        """Names of the edited projections of a block."""
        return projections_of(block, self.settings.projections or "down")

    # ---- editing and training

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One ridge regression of all requests for each projection.

        Raises:
            NonFiniteError: Factors of a projection are NaN, or its ridge has vanished.
            TemporaryFileError: There is no space for rows that wait for the solve.
        """
        origin, at_once = self.prepare_edit(requests), self.settings.at_once
        return compute_shift_edit(self.base, self.network, requests, at_once, origin)

    def batch_gradients(self, batch: EditBatch) -> Iterator[MetaGradient]:
        """The meta-gradient of a batch whose requests one edit writes, over all ranks."""
        base, network, settings = self.base, self.network, self.settings
        episodes = self.draw_episodes(self.examples_of(batch), 1)
        parts, shifts = training_shifts(base, network, episodes, settings.at_once)
        weights, groups = (settings.c_edit, settings.c_loc, 0.0), [WeightedEpisodes(episodes)]
        yield shift_gradient(base, network, parts, shifts, groups, weights, settings.at_once)
