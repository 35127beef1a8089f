"""RLEdit: MALMEN's networks, trained on whole sequences of edits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import EditOrigin
from kedit_lightning.methods.hypernetwork.massive import Group, edit_of
from kedit_lightning.methods.hypernetwork.massive_base import MassiveMethod, Projections
from kedit_lightning.methods.hypernetwork.outcome import Outcome
from kedit_lightning.methods.hypernetwork.values import Tokens
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
        layers: Blocks that are edited; negative numbers count from the end. The checkpoint's, or
            else the last nine.
        projections: Which of their MLP projections: ``down``, the one that writes into the residual
            stream, ``up``, those that read it, or ``all``. The checkpoint's, or else ``up``.
        modules: Names of the projections to edit instead, by their names in the model.
        tokens: Tokens of a request that give keys: those that predict its ``answer``, or ``all``.
            The checkpoint's, or else ``answer``.
        rank: Rank of the networks' matrices. The checkpoint's, or else 1024.
        blocks: Residual blocks of each network. The checkpoint's, or else 4.
        shared: One network for all projections of the same shape, rather than one each. The
            checkpoint's, or else true.
        normalise: Bring inputs and gradients to mean 0 and standard deviation 1 first.
        lr: Learning rate of the networks.
        lr_lr: Learning rate at which the logarithms of ``edit_lr`` and ``ridge`` learn.
        lr_end: Share of the learning rates that is left at the end of the fit; they fall evenly.
        edit_lr: Starting size of the wanted changes, one number a projection, which is learned.
        ridge: Starting cost of a shift of norm 1, one number a projection, which is learned.
        c_edit: Weight of the new answers in the loss.
        c_loc: Weight of locality in the loss.
        c_reg: Weight of the squared norm of each chunk's shifts.
        n_edits: Examples a chunk.
        trajectory: Chunks a trajectory.
        back_depth: Chunks before the present one whose questions are asked again.
        decay: Weight of a chunk's questions, relative to those of the chunk after it.
        steps_per_trajectory: Steps of the optimizer a trajectory, evenly spread over its chunks.
        at_once: Examples that run through the model together, in training and in editing.
        n_rephrases: Rephrases asked an example; the next ones in each epoch.
        own_wording: Ask the request's own prompt too, beside the rephrases.
        vary_targets: Write another answer in each epoch, one that some record gives instead of the
            same old answer. It makes more of few records; they need ``target_old``.
        n_locality: Locality probes asked an example; the next ones in each epoch.
        clip: Largest norm of the gradient of a step.
        checkpoint: What to start from: a file that ``fit`` wrote, or ``none`` for untrained
            networks.
        seed: Start of all random choices.
    """

    last_blocks: ClassVar[int] = 9
    usual_projections: ClassVar[Projections] = "up"
    usual_rank: ClassVar[int] = 1024
    usual_blocks: ClassVar[int] = 4

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        projections: Projections | None = None,
        modules: list[str] | None = None,
        tokens: Tokens | None = None,
        rank: int | None = None,
        blocks: int | None = None,
        shared: bool | None = None,
        normalise: bool = True,
        lr: float = 1e-5,
        lr_lr: float = 1e-3,
        lr_end: float = 1.0,
        edit_lr: float = 1e-6,
        ridge: float = 1.0,
        c_edit: float = 1.0,
        c_loc: float = 0.6,
        c_reg: float = 1e-4,
        n_edits: int = 20,
        trajectory: int = 400,
        back_depth: int = 10,
        decay: float = 0.95,
        steps_per_trajectory: int = 1,
        at_once: int = 32,
        n_rephrases: int = 1,
        own_wording: bool = False,
        vary_targets: bool = False,
        n_locality: int = 1,
        clip: float = 1.0,
        checkpoint: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(base_model, seed)
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
                    dense = any(shift.keys is None for shift in shifts.values())
                    edit_of(self.base, shifts.items(), dense, EditOrigin()).apply()
