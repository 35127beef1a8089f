"""Edits of single facts that are computed together, each as it is alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, overload, runtime_checkable

from kedit_lightning.contradictions import settle
from kedit_lightning.edits import Edit
from kedit_lightning.methods.shared.target_probability import note_each
from kedit_lightning.requests import EditRequest


@runtime_checkable
class JointMethod(Protocol):
    """A method that computes the edits of several requests together, faster than one by one."""

    def computing(self, requests: Sequence[EditRequest]) -> AbstractContextManager[None]:
        """Check requests and build; inside, gradients are enabled."""

    def noted_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One edit of some requests, with its notes."""

    def edits_together(self, requests: Sequence[EditRequest]) -> Sequence[Edit]:
        """The edit of each request, as it is without the others."""

    def together(self, requests: Sequence[EditRequest]) -> int:
        """Number of requests whose edits fit into memory together, at least 1."""


class JointEdits(Sequence[Edit]):
    """The edits of several examples, apart from each other; those of one fact are found together.

    Parts of as many as fit into memory are computed when one of their edits is asked for, and only
    the last part is held, beside the last edit of several facts.  Which edits make a part depends
    on the examples alone, so that those of a run that is continued are equal to the last bit.

    Args:
        method: The method.
        groups: The requests of each example.
    """

    def __init__(self, method: JointMethod, groups: Iterable[Sequence[EditRequest]]) -> None:
        self._method = method
        self._groups = [settle(group, "last") for group in groups]
        single = [i for i, group in enumerate(self._groups) if len(group) == 1]
        requests = [self._groups[i][0] for i in single]
        size = 1
        if len(single) > 1:
            with method.computing(requests):
                size = method.together(requests)
        parts = [single[i : i + size] for i in range(0, len(single), size)]
        #: The part of each example; one of several facts is alone.
        self._parts = {i: part for part in parts for i in part}
        self._held: dict[int, Edit] = {}
        #: The last edit of several facts; it stands between those of a part.
        self._alone: dict[int, Edit] = {}
        if self._groups:
            self[0]  # their time is shared by all where they make one part

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> Edit: ...

    @overload
    def __getitem__(self, index: slice) -> list[Edit]: ...

    def __getitem__(self, index: int | slice) -> Edit | list[Edit]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number not in self._parts:
            if number not in self._alone:
                self._alone = {}
                self._alone = self._computed([number])
            return self._alone[number]
        if number not in self._held:
            self._held = {}  # before the next takes as much memory
            self._held = self._computed(self._parts[number])
        return self._held[number]

    def _computed(self, part: Sequence[int]) -> dict[int, Edit]:
        if len(part) == 1:
            return {part[0]: self._method.noted_edit(self._groups[part[0]])}
        requests = [self._groups[i][0] for i in part]
        with self._method.computing(requests):
            edits = self._method.edits_together(requests)
            note_each(edits, requests)
        return dict(zip(part, edits, strict=True))
