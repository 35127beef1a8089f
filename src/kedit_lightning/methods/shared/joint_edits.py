"""Edits of examples that are computed together, each as it is alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple, Protocol, TypeAlias, overload, runtime_checkable

from kedit_lightning.contradictions import settle
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KEditError, one_line
from kedit_lightning.methods.shared.target_probability import note_each
from kedit_lightning.requests import EditRequest

#: The requests of some examples.
Groups: TypeAlias = Sequence[Sequence[EditRequest]]


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
    """Examples whose edits are computed together.

    Args:
        numbers: The numbers of the examples.
        fits: Whether they are known to fit into memory.
    """

    numbers: Sequence[int]
    fits: bool


class JointEdits(Sequence[Edit]):
    """The edits of several examples, apart from each other, some of which are computed together.

    Parts of as many as fit into memory are computed when one of their edits is asked for, and only
    the last part is held, beside the last edit that is computed alone.  Which edits make a part
    depends on the examples alone, so that those of a run that is continued are equal to the last
    bit.

    A part that fails is halved until the example that cannot be edited is alone, and no other is
    lost with it.  Its own error is raised when its edit is asked for.

    Args:
        groups: The requests of each example.
        joint: Numbers of the examples that are computed together.
        alone: Computes the edit of one example.
        together: Computes the edits of several, each as it is alone.
        size: How many of some examples fit into memory together; all of them if not given.
    """

    def __init__(
        self,
        groups: Groups,
        joint: Sequence[int],
        alone: Callable[[Sequence[EditRequest]], Edit],
        together: Callable[[Groups], Sequence[Edit]],
        size: Callable[[Groups], int] = len,
    ) -> None:
        self._groups = groups
        self._compute_alone, self._compute_together, self._size = alone, together, size
        #: The part of each example that is in one.
        self._parts = dict.fromkeys(joint, _Part(joint, fits=False))
        self._held: dict[int, Edit] = {}
        #: The last edit of an example in no part; it stands between those of a part.
        self._alone: dict[int, Edit] = {}
        if groups:
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
                self._alone = {number: self._compute_alone(self._groups[number])}
            return self._alone[number]
        while number not in self._held:
            self._held = {}  # before the next takes as much memory
            self._compute(self._parts[number])
        return self._held[number]

    def _compute(self, part: _Part) -> None:
        """Hold the edits of a part, or divide it where it is too large or one of them fails."""
        numbers, fits = part
        groups = [self._groups[number] for number in numbers]
        if len(groups) == 1:
            self._held = {numbers[0]: self._compute_alone(groups[0])}
            return
        try:
            size = len(groups) if fits else self._size(groups)
            if size >= len(groups):
                self._held = dict(zip(numbers, self._compute_together(groups), strict=True))
                return
            fits = True
        except Exception as error:
            if not isinstance(error, KEditError):  # more than a fact that cannot be edited
                warnings.warn(
                    f"{len(groups)} edits could not be computed together "
                    f"({type(error).__name__}: {one_line(error)}); they are computed in two halves",
                    stacklevel=3,
                )
            size = (len(groups) + 1) // 2
        for own in chunks(numbers, size):
            self._parts |= dict.fromkeys(own, _Part(own, fits))


def single_facts(method: JointMethod, groups: Groups) -> JointEdits:
    """The edits of several examples; those of one fact each are computed together.

    Args:
        method: The method.
        groups: The requests of each example.
    """
    settled = [settle(group, "last") for group in groups]

    def size(some: Groups) -> int:
        requests = [request for (request,) in some]
        with method.computing(requests):
            return method.together(requests)

    def together(some: Groups) -> Sequence[Edit]:
        requests = [request for (request,) in some]
        with method.computing(requests):
            return note_each(method.edits_together(requests), requests)

    joint = [number for number, group in enumerate(settled) if len(group) == 1]
    return JointEdits(settled, joint, method.noted_edit, together, size)


class ReadyEdits:
    """Edits that were computed together, until each is asked for by its requests."""

    def __init__(self) -> None:
        self._edits: dict[tuple[EditRequest, ...], Edit] = {}

    @contextmanager
    def holding(self, groups: Groups, edits: Iterable[Edit]) -> Iterator[None]:
        """Inside, there are the edits of some examples."""
        self._edits = dict(zip(map(tuple, groups), edits, strict=True))
        try:
            yield
        finally:
            self._edits = {}

    def pop(self, requests: Sequence[EditRequest]) -> Edit | None:
        """The edit of some requests, which is given away; ``None`` if there is none."""
        return self._edits.pop(tuple(requests), None)
