"""MALMEN: thousands of requests written together, by one solve a projection."""

from __future__ import annotations

from typing import ClassVar

from kedit_lightning.methods.hypernetwork.malmen.massive import Group
from kedit_lightning.methods.hypernetwork.malmen.massive_base import MassiveMethod
from kedit_lightning.methods.hypernetwork.shared.outcome import Outcome
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
    """

    last_blocks: ClassVar[int] = 6

    def learn(self, batch: EditBatch) -> Outcome:
        """Losses and gradient of a batch written together, with those of the other ranks.

        Takes the batch into the statistics of the normalisers, and changes nothing else.
        """
        examples = self.draw_episodes(self.examples_of(batch), 1)
        parts, shifts = self.write(examples)
        return self.cost(parts, shifts, [Group(examples)])
