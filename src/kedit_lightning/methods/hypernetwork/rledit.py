"""RLEdit: MALMEN's hypernetwork, trained on whole sequences of edits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import EditOrigin
from kedit_lightning.methods.capabilities import Count, CountOrZero, NotNegative
from kedit_lightning.methods.hypernetwork.shared.hypernetwork_method import (
    HypernetworkMethod,
    HypernetworkSettings,
)
from kedit_lightning.methods.hypernetwork.shared.malmen_method import MALMENMethod
from kedit_lightning.methods.hypernetwork.shared.meta_gradient import MetaGradient
from kedit_lightning.methods.hypernetwork.shared.normal_equations import smaller_dense
from kedit_lightning.methods.hypernetwork.shared.parameter_shift import shift_edit, training_shifts
from kedit_lightning.methods.hypernetwork.shared.shift_gradient import (
    WeightedEpisodes,
    shift_gradient,
)
from kedit_lightning.methods.hypernetwork.shared.value_networks import (
    MALMENMethodSettings,
    ValuePlan,
)
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.requests import EditBatch


@dataclass(frozen=True)
class RLEditSettings(MALMENMethodSettings, HypernetworkSettings):
    """Settings of :class:`RLEdit`."""

    c_reg: NotNegative
    trajectory: Count
    back_depth: CountOrZero
    decay: NotNegative
    steps_per_trajectory: Count


class RLEdit(MALMENMethod, HypernetworkMethod):
    """RLEdit, from "Reinforced Lifelong Editing for Language Models" (Li et al. 2025).

    A training batch is a trajectory: its examples are edited in chunks, each on top of the edits
    before. The loss after each chunk is that of its own probes and of those of earlier chunks,
    with decaying weights. The gradient is deterministic and goes through the edit of the present
    chunk alone, not through what earlier edits do to later gradients, so it is training on many
    steps more than reinforcement learning. Edits are computed as MALMEN's.

    Differences from the released code: the penalty on the norm of a shift has its true gradient,
    where the released code has none; the locality loss is differentiated while the edit is in
    force, where the released code takes the edit off first; gradients are clipped once an
    optimizer step, after averaging over chunks; rates and ridges are learned as logarithms, in a
    group of their own.

    By default the last nine blocks are edited.

    Args:
        base_model: The model to edit.
        c_loc: Weight of the locality loss.
        c_reg: Weight of the squared norm of each chunk's shifts.
        n_edits: Examples of a chunk.
        trajectory: Chunks of a trajectory.
        back_depth: Number of earlier chunks whose probes are run again.
        decay: Weight of a chunk's loss, relative to that of the next chunk.
        steps_per_trajectory: Optimizer steps of a trajectory, evenly spread over its chunks.
        at_once: Most examples that run through the model together, in training and in editing.
        **settings: The settings of :class:`MALMEN` and :class:`HypernetworkMethod`.
    """

    last_blocks: ClassVar[int] = 9
    default_projections = "up"
    plan_type = ValuePlan
    settings_type: ClassVar[type[MethodSettings]] = RLEditSettings

    settings: RLEditSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        c_loc: float = 0.6,
        c_reg: float = 1e-4,
        n_edits: int = 20,
        trajectory: int = 400,
        back_depth: int = 10,
        decay: float = 0.95,
        steps_per_trajectory: int = 1,
        at_once: int = 32,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, c_loc=c_loc, n_edits=n_edits, at_once=at_once, **settings)
        self.fit_batch_size = n_edits * trajectory

    def default_plan(self) -> ValuePlan:
        """The architecture that the method has unless settings say otherwise."""
        return ValuePlan(self.default_modules(), rank=1024, blocks=4)

    def batch_gradients(self, batch: EditBatch) -> Iterator[MetaGradient]:
        """The meta-gradients of a trajectory's optimizer steps, over all ranks.

        The edits of earlier chunks are not computed again when the networks have changed.
        """
        steps = self.settings.steps_per_trajectory
        count = -(-len(batch) // self.settings.n_edits)
        total = MetaGradient.zero(self.network)
        for number, gradient in enumerate(self._chunk_gradients(batch), start=1):
            total += gradient
            if number * steps // count > (number - 1) * steps // count:
                yield total
                total = MetaGradient.zero(self.network)

    def _chunk_gradients(self, batch: EditBatch) -> Iterator[MetaGradient]:
        """The meta-gradient of each chunk, edited on top of the chunks before it.

        The stack is restored when the iterator has ended or is closed.
        """
        settings, size = self.settings, self.settings.n_edits
        weights = settings.c_edit, settings.c_loc, settings.c_reg
        episodes = self.draw_episodes(self.examples_of(batch), 1)
        chunks = [episodes[first : first + size] for first in range(0, len(episodes), size)]
        with self.base.edits.restored():
            for number, chunk in enumerate(chunks):
                parts, shifts = training_shifts(self.base, self.network, chunk, settings.at_once)
                groups = [
                    WeightedEpisodes(chunks[number - back], settings.decay**back)
                    for back in range(min(number, settings.back_depth) + 1)
                ]
                gradient = shift_gradient(
                    self.base, self.network, parts, shifts, groups, weights, settings.at_once
                )
                yield gradient
                if not gradient.skipped:
                    dense = smaller_dense(shift.sizes for shift in shifts.values())
                    shift_edit(self.base, shifts.items(), dense, EditOrigin()).apply()
