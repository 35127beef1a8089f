"""RLEdit: MALMEN's networks, trained on whole sequences of edits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import EditOrigin
from kedit_lightning.methods.hypernetwork.malmen.massive import Group, edit_of
from kedit_lightning.methods.hypernetwork.malmen.massive_base import MassiveMethod, Projections
from kedit_lightning.methods.hypernetwork.malmen.normal_equations import smaller_dense
from kedit_lightning.methods.hypernetwork.shared.outcome import Outcome
from kedit_lightning.requests import EditBatch


class RLEdit(MassiveMethod):
    """RLEdit, from "Reinforced Lifelong Editing for Language Models" (Li et al. 2025).

    A training batch is a trajectory: its examples are written in chunks, each on top of the edits
    before. After each chunk its own questions and those of the chunks before it are asked, the
    older ones counting less. The gradient is deterministic and goes through the edit of the
    present chunk alone, not through what earlier edits do to later gradients, so it is training on
    many steps more than reinforcement learning. Editing is that of MALMEN.

    Differences from the released code: the cost of the size of a shift has its true gradient,
    where the released code has none; the divergence on unrelated questions is differentiated while
    the edit is in force, where the released code takes the edit off first; gradients are clipped
    once a step of the optimizer, after averaging over chunks; rates and ridges are learned as
    logarithms, in a group of their own.

    Args:
        base_model: The model to edit.
        c_loc: Weight of locality in the loss.
        c_reg: Weight of the squared norm of each chunk's shifts.
        n_edits: Examples a chunk.
        trajectory: Chunks a trajectory.
        back_depth: Chunks before the present one whose questions are asked again.
        decay: Weight of a chunk's questions, relative to those of the chunk after it.
        steps_per_trajectory: Steps of the optimizer a trajectory, evenly spread over its chunks.
        **settings: Those of :class:`MassiveMethod`.
    """

    last_blocks: ClassVar[int] = 9
    usual_projections: ClassVar[Projections] = "up"
    usual_rank: ClassVar[int] = 1024
    usual_blocks: ClassVar[int] = 4

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
        **settings: Any,
    ) -> None:
        super().__init__(base_model, c_loc=c_loc, n_edits=n_edits, **settings)
        self.fit_batch_size = n_edits * trajectory

    def learn(self, batch: EditBatch) -> Outcome:
        """Losses and gradient of a trajectory as a whole, with those of the other ranks.

        Takes the batch into the statistics of the normalisers, and changes nothing else.
        """
        return sum(self._chunks(batch), Outcome.nothing(self.network))

    def outcomes(self, batch: EditBatch) -> Iterator[Outcome]:
        """A trajectory in as many parts as it has steps of the optimizer.

        The edits of earlier chunks stay as they were made when the networks have stepped.
        """
        steps = self.hparams["steps_per_trajectory"]
        count = -(-len(batch) // self.hparams["n_edits"])
        total = Outcome.nothing(self.network)
        for number, outcome in enumerate(self._chunks(batch), start=1):
            total += outcome
            if number * steps // count > (number - 1) * steps // count:
                yield total
                total = Outcome.nothing(self.network)

    def _chunks(self, batch: EditBatch) -> Iterator[Outcome]:
        """What each chunk costs, written on top of the chunks before it.

        The base model is as before when the iterator has ended or is closed.
        """
        settings, size = self.hparams, self.hparams["n_edits"]
        examples = self.draw_episodes(self.examples_of(batch), 1)
        chunks = [examples[first : first + size] for first in range(0, len(examples), size)]
        with self.base.edits.restored():
            for number, chunk in enumerate(chunks):
                parts, shifts = self.write(chunk)
                asked = [
                    Group(chunks[number - back], settings["decay"] ** back)
                    for back in range(min(number, settings["back_depth"]) + 1)
                ]
                outcome = self.cost(parts, shifts, asked, settings["c_reg"])
                yield outcome
                if not outcome.skipped:
                    dense = smaller_dense(shift.sizes for shift in shifts.values())
                    edit_of(self.base, shifts.items(), dense, EditOrigin()).apply()
