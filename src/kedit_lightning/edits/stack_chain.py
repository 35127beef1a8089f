"""What an edit says of those below it: a hash that chains their ids, in a size that never grows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeAlias

#: The id of the one edit below, or nothing where there is none; of more edits, their number with
#: the hash of all their ids in order, and the id of the last. Earlier releases listed all ids.
StackMark: TypeAlias = tuple[str, ...]
_CHAIN = "chain"


class Identified(Protocol):
    """What has an id."""

    @property
    def id(self) -> str:
        """Its id."""


class StackChain:
    """Marks of a stack after each of its edits; a mark follows from the one before and an id."""

    def __init__(self, ids: Sequence[str] = ()) -> None:
        self._ids: list[str] = []
        self._hashes = [""]
        self.extend(ids)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def mark(self) -> StackMark:
        """The mark of all edits."""
        if len(self._ids) < 2:
            return tuple(self._ids)
        return f"{_CHAIN}:{len(self._ids)}:{self._hashes[-1]}", self._ids[-1]

    def extend(self, ids: Sequence[str]) -> None:
        """Put edits on top."""
        for id in ids:
            chained = hashlib.sha256(f"{self._hashes[-1]} {id}".encode()).hexdigest()[:16]
            self._hashes.append(chained)
            self._ids.append(id)

    def keep(self, count: int) -> None:
        """Forget the edits above the lowest ``count``."""
        del self._ids[count:], self._hashes[count + 1 :]

    def follow(self, edits: Sequence[Identified]) -> StackMark:
        """The mark of edits that begin with those that are known."""
        known = len(self._ids)
        if known and edits[known - 1].id != self._ids[-1]:  # a note changes an id
            self.keep(known - 1)
        self.extend([edit.id for edit in edits[len(self._ids) :]])
        return self.mark


def stack_mark(stack: Sequence[str]) -> StackMark:
    """The mark that ids in order have; a mark is its own.

    >>> stack_mark(["a"]), stack_mark(["a", "b"])[1]
    (('a',), 'b')
    """
    if stack and stack[0].startswith(f"{_CHAIN}:"):
        return tuple(stack)
    return StackChain(stack).mark


def described(stack: Sequence[str]) -> str:
    """A stack in words, from ids or a mark.

    >>> described([]), described(stack_mark(["a", "b", "c"]))
    ('no edits', '3 edits up to c')
    """
    mark = stack_mark(stack)
    if len(mark) < 2:
        return mark[0] if mark else "no edits"
    return f"{mark[0].split(':')[1]} edits up to {mark[1]}"
