"""The sum of the lowest edits of a long stack, so that one more takes as long as the first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kedit_lightning.edits.edit import Edit
from kedit_lightning.edits.effects import AddToOutput, Effect, KeepMemory, sum_deltas
from kedit_lightning.edits.hook_plan import effects_of
from kedit_lightning.edits.projections import find_module

#: Edits that are folded together. A stack with fewer is not folded.
BLOCK = 64


class FoldedPrefix:
    """Effects of a stack, where changes of weights by its lowest edits are summed.

    Edits are folded in blocks of a fixed size from the bottom, up to the first block with an edit
    that does more than change weights.  What comes out is a function of the edits in their order
    alone, whatever the stack was before.  Memories are left out: the stack reads them itself.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._edits: Sequence[Edit] = []
        #: Number of edits folded, and their effects: the longest prefix, and the one before it, to
        #: which the stack comes back when an edit is applied for a moment.
        self._folds: list[tuple[int, list[Effect]]] = []

    def effects(self, edits: Sequence[Edit]) -> list[Effect]:
        """Effects of edits in the order they act, oldest first."""
        if len(edits) < BLOCK:
            self._edits, self._folds = (), []
            return effects_of(edits)
        self._folds = [fold for fold in self._folds if self._holds(fold[0], edits)]
        count, effects = self._folds[-1] if self._folds else (0, [])
        while count + BLOCK <= len(edits):
            block = effects_of(edits[count : count + BLOCK])
            if not all(isinstance(effect, AddToOutput | KeepMemory) for effect in block):
                break
            count, effects = count + BLOCK, self._summed([*effects, *block])
            self._folds = [*self._folds[-1:], (count, effects)]
        self._edits = edits
        return [*effects, *effects_of(edits[count:])]

    def _holds(self, count: int, edits: Sequence[Edit]) -> bool:
        """Whether the edits of a fold are the lowest ones still."""
        return count <= len(edits) and edits[:count] == self._edits[:count]

    def _summed(self, effects: Sequence[Effect]) -> list[Effect]:
        modules: dict[str, list[AddToOutput]] = {}
        for effect in effects:
            if isinstance(effect, AddToOutput):
                modules.setdefault(effect.module, []).append(effect)
        found: list[Effect] = []
        for name, changes in modules.items():
            total = sum_deltas([c.delta for c in changes], find_module(self._model, name))
            if total is not None:
                found.append(AddToOutput(name, total))
        return found
