"""T-Patcher: one neuron a mistake, added to the last MLP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.contradictions import settle
from kedit_lightning.edits import Edit, NeuronsEdit
from kedit_lightning.edits.kinds.neurons.neurons import Neurons
from kedit_lightning.edits.kinds.neurons.neurons_edit import stacked_queries
from kedit_lightning.edits.projections import projection_shape
from kedit_lightning.edits.rounding import state_rounding
from kedit_lightning.methods.memory.shared.background import Background
from kedit_lightning.methods.memory.shared.last_block import LastBlockPasses, last_mlp
from kedit_lightning.methods.memory.shared.query_memory import irrelevant_queries, text_queries
from kedit_lightning.methods.memory.tpatcher.patch_training import (
    PatchMemory,
    TPatcherSettings,
    train_patches,
)
from kedit_lightning.methods.method import EditMethod, MethodSettings
from kedit_lightning.methods.shared.joint_edits import Groups, JointEdits, ReadyEdits
from kedit_lightning.requests import EditRequest

#: Requests whose patches are trained together.
_TOGETHER = 32


class TPatcher(EditMethod):
    """Adds a neuron to the last MLP for each token of an answer that the model gets wrong.

    A patch is a key, a bias and a value. It fires on the token before the one that was wrong, and
    adds the value that corrects it. Trained are the likelihood of the answer token, an activation
    loss, so that it fires there, and a memory loss, so that it is silent on other texts and on the
    facts of other edits. Where it is silent it adds exactly nothing. All patches are rectified,
    whatever the activation of the model's own neurons; in the paper they have that of the model.
    The memory is a small packaged text and, for each request, prompts that it has nothing to do
    with; the paper takes it from the data of its task. Paper: https://arxiv.org/abs/2301.09785.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        lr: Learning rate of Adam.
        steps: Steps of Adam at most; a patch ends earlier once its token is right and it is silent
            on all of the memory.
        activation_weight: Weight of the activation loss.
        memory_weight: Weight of the memory loss.
        margin: Distance that the memory loss keeps from firing, and from the patch's own
            activation; the paper's β and γ are its negative.
        top_share: How many of the largest scores on the memory count in the memory loss, as a share
            of the text; in the paper 1000 of 40000.
        amplify: Factor on values, which makes them learn as much faster than keys.
        weight_decay: L2 penalty on keys, biases and values.
        stop_loss: Loss of an answer token below which it counts as learnt.
        irrelevant: Prompts in the memory of each request that it has nothing to do with.
        background: File of such prompts, one a line, in place of the usual ones, which are the
            request's own about subjects that the model names and openings of texts.
        seed: Seed of the first values and of the irrelevant prompts; both depend on the requests
            too.
    """

    settings_type: ClassVar[type[MethodSettings]] = TPatcherSettings
    settings: TPatcherSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        lr: float = 1e-2,
        steps: int = 500,
        activation_weight: float = 1.0,
        memory_weight: float = 10.0,
        margin: float = 3.0,
        top_share: float = 0.025,
        amplify: float = 10.0,
        weight_decay: float = 1e-2,
        stop_loss: float = 5e-2,
        irrelevant: int = 32,
        background: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the last MLP.

        Raises:
            UnsupportedUseError: It cannot be edited.
            ModuleNotLocatedError: No block has a dense MLP of its own.
        """
        self.place = last_mlp(self.base)
        self._text: Tensor | None = None
        self._background = Background(self.base, self.settings.start, self.settings.background)
        #: Edits that :meth:`edit_each` has computed, by their requests.
        self._patched = ReadyEdits()

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """Train the patches of the requests, each silent on the queries of the others."""
        return self._patched.pop(requests) or self.patched([requests])[0]

    def edit_each(self, requests_of_examples: Sequence[Sequence[EditRequest]]) -> Iterable[Edit]:
        """Edits of several examples, apart from each other; their patches are trained together."""
        groups = [settle(group, "last") for group in requests_of_examples]
        return JointEdits(groups, range(len(groups)), self.noted_edit, self._together)

    def _together(self, groups: Groups) -> Sequence[Edit]:
        requests = [request for group in groups for request in group]
        with self.computing(requests), self._patched.holding(groups, self.patched(groups)):
            return [self.noted_edit(group) for group in groups]

    def patched(self, groups: Sequence[Sequence[EditRequest]]) -> list[NeuronsEdit]:
        """One edit for each group of requests, independent of the others."""
        requests = [request for group in groups for request in group]
        count = self.settings.irrelevant
        irrelevant = [prompts for group in groups for prompts in self._background.of(group, count)]
        parts = [slice(i, i + _TOGETHER) for i in range(0, len(requests), _TOGETHER)]
        passes = [LastBlockPasses(self.base, self.place, requests[p]) for p in parts]
        tokens = [part.row + _TOGETHER * number for number, part in enumerate(passes)]
        group_of = [number for number, group in enumerate(groups) for _ in group]
        owners = passes[0].row.new_tensor(group_of)
        queries = torch.cat([part.queries for part in passes])
        pool = queries, owners[torch.cat(tokens)]
        found = [
            self._trained(part, requests[at], irrelevant[at], owners[rows], pool)
            for part, at, rows in zip(passes, parts, tokens, strict=True)
        ]
        keys, biases, values, of_group, losses = map(torch.cat, zip(*found, strict=True))
        edits = []
        for number, group in enumerate(groups):
            mine = of_group == number
            own = Neurons(keys[mine], biases[mine], values[mine], queries[pool[1] == number])
            notes = {"neurons": len(own), "loss": float(losses[mine].mean()) if len(own) else None}
            edits.append(NeuronsEdit(self.base, {self.place: own}, self.origin(group, **notes)))
        return edits

    def _trained(
        self,
        passes: LastBlockPasses,
        requests: Sequence[EditRequest],
        irrelevant: Sequence[Sequence[str]],
        groups: Tensor,
        pool: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, ...]:
        """Patches for the tokens that are wrong: keys, biases, values, groups and losses.

        Args:
            passes: Passes of some requests, at all tokens of their answers.
            requests: These requests.
            irrelevant: Prompts that each of them has nothing to do with.
            groups: The group of each token of the passes. Shape ``[n]``.
            pool: Queries of all requests, ``[k, d]``, and their groups, ``[k]``.
        """
        wrong = (passes.logits.argmax(-1) != passes.targets).nonzero()[:, 0]
        start = self._first_values(requests, passes)[wrong]
        passes, groups = passes.select(wrong), groups[wrong]
        earlier = torch.cat([pool[0][:0], *stacked_queries(self.base, self.place)])
        foreign, asked_for = irrelevant_queries(self.base, self.place.reads, requests, irrelevant)
        mine = [
            groups[:, None] == pool[1],
            groups.new_ones(len(groups), len(earlier), dtype=torch.bool),
            passes.row[:, None] == asked_for,
        ]
        others = torch.cat([pool[0], earlier, foreign])
        rounding = state_rounding(self.base.dtype)
        memory = PatchMemory.of(self.text, others, passes.queries, torch.cat(mine, 1), rounding)
        keys, biases, values, losses = train_patches(passes, memory, start, self.settings)
        return keys, biases, values, groups, losses

    @property
    def text(self) -> Tensor:
        """Inputs of the last MLP in the packaged text, without edits. Shape ``[m, d]``."""
        if self._text is None:
            with self.base.edits.suspended():
                self._text = text_queries(self.base, self.place.reads)
        return self._text

    def _first_values(self, requests: Sequence[EditRequest], passes: LastBlockPasses) -> Tensor:
        """Random values that depend on each request alone. Shape ``[n, d_out]``."""
        width = projection_shape(self.base.module(self.place.writes))[1]
        counts = passes.row.bincount(minlength=len(requests)).tolist()
        drawn = [
            torch.randn(count, width, generator=self.generator([r], "values"), dtype=torch.float64)
            for r, count in zip(requests, counts, strict=True)
        ]
        return torch.cat(drawn).to(passes.queries)
