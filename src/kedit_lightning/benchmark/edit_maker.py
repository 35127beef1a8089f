"""Edits as a run makes them: computed, timed and handed on, or taken from an interrupted run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark.costs import Clock, fixed_randomness
from kedit_lightning.edits import Edit
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.requests import EditRequest

EditFunction: TypeAlias = Callable[[Sequence[EditRequest]], Edit]
EditEachFunction: TypeAlias = Callable[[Sequence[Sequence[EditRequest]]], Iterable[Edit]]


class SavedRun(Protocol):
    """What an interrupted run has left behind."""

    def record(self, id: str, stage: str) -> ExampleRecord | None:
        """The record of an example at a stage, if it was written."""

    def has_edit(self, name: str) -> bool:
        """Whether an edit was saved."""

    def edit(self, name: str, base: BaseModel) -> Edit | None:
        """An edit by its name, if it was saved."""


@dataclass(frozen=True)
class Made:
    """An edit that is not applied yet.

    Args:
        name: Its name in the run.
        edit: The edit.
        seconds: How long it took to compute; ``None`` for one that was saved.
    """

    name: str
    edit: Edit
    seconds: float | None


class EditMaker:
    """Makes the edits of a run.

    All global random numbers of an edit depend on the seed and its name alone, so that a resumed
    run computes the same edits as an unbroken one, alone or together with others.

    Args:
        base: The base model.
        edit: Computes an edit from requests.
        edit_each: Computes edits of several examples apart from each other, see
            ``EditMethod.edit_each``; one by one if not given.
        seed: Seed of the run.
        saved: What an interrupted run has left behind.
        on_edit: Called with the name and the edit as soon as it has been computed.
    """

    def __init__(
        self,
        base: BaseModel,
        edit: EditFunction,
        edit_each: EditEachFunction | None = None,
        seed: int = 0,
        saved: SavedRun | None = None,
        on_edit: Callable[[str, Edit], None] | None = None,
    ) -> None:
        self._base = base
        self._edit = edit
        self._edit_each = edit_each or (lambda groups: map(edit, groups))
        self._seed = seed
        self._saved = saved
        self._on_edit = on_edit

    def one(self, name: str, requests: Sequence[EditRequest]) -> Made:
        """Compute an edit, or take the saved one."""
        if self._saved is not None and (edit := self._saved.edit(name, self._base)) is not None:
            return Made(name, edit, None)
        clock = Clock(self._base)
        with fixed_randomness(self._seed, name):
            edit = self._edit(requests)
        return self._new(Made(name, edit, clock.lap()))

    def each(self, wanted: Sequence[tuple[str, Sequence[EditRequest]]]) -> Iterator[Made]:
        """Edits by name and requests, all of them on the stack as it stands.

        Saved ones are taken, the others are computed together where the method knows how, and
        otherwise each when its turn comes, so that no more need be held than the caller keeps.
        Time spent before the first one is there is shared out evenly.
        """
        saved = self._saved
        missing = [own for own in wanted if saved is None or not saved.has_edit(own[0])]
        clock, shared = Clock(self._base), 0.0
        fresh: Iterator[Edit] = iter(())
        if missing:
            with fixed_randomness(self._seed, missing[0][0]):
                fresh = iter(self._edit_each([requests for _, requests in missing]))
            shared = clock.lap() / len(missing)
        names = {name for name, _ in missing}
        for name, requests in wanted:
            if name not in names:
                yield self.one(name, requests)
                continue
            clock.lap()
            with fixed_randomness(self._seed, name):
                edit = next(fresh)
            yield self._new(Made(name, edit, shared + clock.lap()))

    def _new(self, made: Made) -> Made:
        if self._on_edit is not None:
            self._on_edit(made.name, made.edit)
        return made
