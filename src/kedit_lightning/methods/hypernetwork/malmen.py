"""MALMEN: thousands of requests written together, by one solve a projection."""

from __future__ import annotations

from typing import ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.methods.hypernetwork.massive import Group
from kedit_lightning.methods.hypernetwork.massive_base import MassiveMethod, Projections
from kedit_lightning.methods.hypernetwork.outcome import Outcome
from kedit_lightning.methods.hypernetwork.values import Tokens
from kedit_lightning.requests import EditBatch


class MALMEN(MassiveMethod):
    """MALMEN, from "Massive Editing for Large Language Models via Meta Learning" (Tan et al. 2024).

    ``fit`` trains small networks that say, for each token of a request, how the output of an
    edited projection is to change there. The changes of all requests are met together, by ridge
    regression, so that they do not cancel as sums of separate edits do. Requests are read in
    minibatches, and the memory of a device does not grow with their number.

    Differences from the released code: rates and ridges are learned as logarithms, in a group of
    their own; the loss is the mean over examples, whatever the minibatches; statistics stand
    still while edits are computed; several processes write the requests of all of them together.

    Args:
        base_model: The model to edit.
        layers: Blocks that are edited; negative numbers count from the end. The checkpoint's, or
            else the last six.
        projections: Which of their MLP projections: ``down``, the one that writes into the residual
            stream, ``up``, those that read it, or ``all``. The checkpoint's, or else ``down``.
        modules: Names of the projections to edit instead, by their names in the model.
        tokens: Tokens of a request that give keys: those that predict its ``answer``, or ``all``.
            The checkpoint's, or else ``answer``.
        rank: Rank of the networks' matrices. The checkpoint's, or else 1920.
        blocks: Residual blocks of each network. The checkpoint's, or else 2.
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
        n_edits: Examples a training step, all of them written together.
        at_once: Examples that run through the model together, in training and in editing.
        n_rephrases: Rephrases asked an example; the next ones in each epoch.
        own_wording: Ask the request's own prompt too, beside the rephrases.
        vary_targets: Write another answer in each epoch, one that some record gives instead of the
            same old answer. It makes more of few records; they need ``target_old``.
        n_locality: Locality probes asked an example; the next ones in each epoch.
        clip: Largest norm of the gradient of a training step.
        checkpoint: What to start from: a file that ``fit`` wrote, or ``none`` for untrained
            networks.
        seed: Start of all random choices.
    """

    last_blocks: ClassVar[int] = 6

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
        c_loc: float = 1.0,
        n_edits: int = 512,
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
        self.fit_batch_size = n_edits

    def learn(self, batch: EditBatch) -> Outcome:
        """Losses and gradient of a batch written together, with those of the other ranks.

        Takes the batch into the statistics of the normalisers, and changes nothing else.
        """
        examples = self.draw_episodes(self.examples_of(batch), 1)
        parts, shifts = self.write(examples)
        return self.cost(parts, shifts, [Group(examples)])
