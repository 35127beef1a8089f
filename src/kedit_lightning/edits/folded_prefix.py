"""The sum of the lowest edits of a long stack, so that one more takes as long as the first."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from kedit_lightning.edits.edit import Edit
from kedit_lightning.edits.effects import (
    AddToOutput,
    Effect,
    KeepMemory,
    RouteRows,
    contents_of,
    sum_deltas,
)
from kedit_lightning.edits.hook_plan import effects_of
from kedit_lightning.edits.projections import find_module

#: Edits that are folded together. A stack with fewer is not folded.
BLOCK = 8
#: Each time so many blocks, and so many times as many, a fold is kept for edits that are rolled
#: back one after another.
_SPACING = 16
#: Numbers in the largest fold that is kept so.
_KEPT_NUMBERS = 2**24


@dataclass(frozen=True)
class Fold:
    """Number of edits, and their effects."""

    count: int
    effects: Sequence[Effect]


class FoldedPrefix:
    """Effects of a stack, where changes by its lowest edits are put together.

    Edits are folded in blocks of a fixed size from the bottom, up to the first block with an edit
    that does more than change weights and outputs of modules.  Changes of weights are summed, and
    what decides row by row is one effect a family.  What comes out is a function of the edits in
    their order alone, whatever the stack was before.  Memories are left out: the stack reads them
    itself.

    Args:
        model: The model.
        edits: The edits, oldest first.
        before: What was known of other edits.
        same: How many of the lowest edits those are too.
    """

    def __init__(
        self,
        model: nn.Module,
        edits: Sequence[Edit] = (),
        before: FoldedPrefix | None = None,
        same: int = 0,
    ) -> None:
        self._model = model
        known = [] if before is None else before._folds
        self._folds: list[Fold] = [fold for fold in known if fold.count <= same]
        last = self._folds[-1] if self._folds else Fold(0, ())
        count, effects = last.count, last.effects
        while count + BLOCK <= len(edits):
            block = effects_of(edits[count : count + BLOCK])
            if not all(isinstance(e, AddToOutput | KeepMemory | RouteRows) for e in block):
                break
            count, effects = count + BLOCK, self._together([*effects, *block])
            self._folds = [*self._kept(), Fold(count, effects)]
        #: Effects of the edits in the order they act, oldest first.
        self.effects: list[Effect] = [*effects, *effects_of(edits[count:])]

    def _kept(self) -> list[Fold]:
        """The folds that another is put on: the last, and small ones that are far apart."""
        latest = {}
        for fold in self._folds:
            for spacing in (BLOCK * _SPACING, BLOCK * _SPACING**2):
                if fold.count % spacing == 0 and _numbers(fold.effects) <= _KEPT_NUMBERS:
                    latest[spacing] = fold
        kept = {fold.count: fold for fold in (*latest.values(), *self._folds[-1:])}
        return [kept[count] for count in sorted(kept)]

    def _together(self, effects: Iterable[Effect]) -> list[Effect]:
        modules: dict[str, list[AddToOutput]] = {}
        routes: dict[tuple[str, Hashable], list[RouteRows]] = {}
        for effect in effects:
            if isinstance(effect, AddToOutput):
                modules.setdefault(effect.module, []).append(effect)
            elif isinstance(effect, RouteRows):
                routes.setdefault((effect.module, effect.family), []).append(effect)
        found: list[Effect] = []
        for name, changes in modules.items():
            total = sum_deltas([c.delta for c in changes], find_module(self._model, name))
            if total is not None:
                found.append(AddToOutput(name, total))
        for (name, family), group in routes.items():
            build, spares = group[0].build, all(route.spares_heads for route in group)
            found.append(RouteRows(name, family, build, contents_of(group), spares))
        return found


def _numbers(effects: Iterable[Effect]) -> int:
    """How many numbers the changes of weights hold."""
    deltas = [effect.delta for effect in effects if isinstance(effect, AddToOutput)]
    parts = [part for d in deltas for part in (d.dense, d.bias, *(d.low_rank or ()))]
    return sum(part.numel() for part in parts if part is not None)
