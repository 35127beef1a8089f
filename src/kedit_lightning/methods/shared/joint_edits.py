"""Edits of single facts that are computed together, each as it is alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import NamedTuple, Protocol, overload, runtime_checkable

from kedit_lightning.contradictions import settle
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KEditError, one_line
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


class _Part(NamedTuple):
    """Examples of one fact each, by number, and whether their edits are known to fit into memory.

    Args:
        numbers: The numbers of the examples.
        fits: Whether they are computed together as they are.
    """

    numbers: Sequence[int]
    fits: bool


class JointEdits(Sequence[Edit]):
    """The edits of several examples, apart from each other; those of one fact are found together.

    Parts of as many as fit into memory are computed when one of their edits is asked for, and only
    the last part is held, beside the last edit of several facts.  Which edits make a part depends
    on the examples alone, so that those of a run that is continued are equal to the last bit.

    A part that fails is halved until the fact that cannot be edited is alone, and no other fact is
    lost with it.  Its own error is raised when its edit is asked for.

    Args:
        method: The method.
        groups: The requests of each example.
    """

    def __init__(self, method: JointMethod, groups: Iterable[Sequence[EditRequest]]) -> None:
        self._method = method
        self._groups = [settle(group, "last") for group in groups]
        single = [i for i, group in enumerate(self._groups) if len(group) == 1]
        #: The part of each example; one of several facts is alone.
        self._parts = dict.fromkeys(single, _Part(single, fits=False))
        self._held: dict[int, Edit] = {}
        #: The last edit of several facts; it stands between those of a part.
        self._alone: dict[int, Edit] = {}
        if self._groups:
            with suppress(Exception):  # it is raised again where that edit is asked for
                self[0]  # their time is shared by all where they make one part

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Edit]:
        # That of a sequence takes an IndexError inside a method for the end.
        return (self[i] for i in range(len(self)))

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
                self._alone = {number: self._method.noted_edit(self._groups[number])}
            return self._alone[number]
        while number not in self._held:
            self._held = {}  # before the next takes as much memory
            part = self._parts[number]
            if len(part.numbers) == 1:
                self._held = {number: self._method.noted_edit(self._groups[number])}
            else:
                self._compute(part)
        return self._held[number]

    def _compute(self, part: _Part) -> None:
        """Hold the edits of a part, or divide it where it is too large or one of them fails."""
        numbers, size = part.numbers, len(part.numbers)
        requests = [self._groups[i][0] for i in numbers]
        fits = True
        try:
            with self._method.computing(requests):
                if not part.fits:
                    size = self._method.together(requests)
                if size >= len(numbers):
                    edits = self._method.edits_together(requests)
                    note_each(edits, requests)
                    self._held = dict(zip(numbers, edits, strict=True))
                    return
        except Exception as error:
            if not isinstance(error, KEditError):  # more than a fact that cannot be edited
                warnings.warn(
                    f"{len(numbers)} edits could not be computed together "
                    f"({type(error).__name__}: {one_line(error)}); they are computed in two halves",
                    stacklevel=3,
                )
            size, fits = (len(numbers) + 1) // 2, part.fits
        for own in chunks(numbers, size):
            self._parts |= dict.fromkeys(own, _Part(own, fits))
