"""The facts of a ledger: which stand already, and which standing ones new facts change."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kedit_lightning.character_forms import comparable
from kedit_lightning.contradictions import OnConflict, contradictions, describe, fact_keys
from kedit_lightning.errors import InvalidRequestError, article_list
from kedit_lightning.requests import EditRequest


class FactIndex:
    """Facts in the order they were written, found by what they ask.

    Looking a fact up takes as long among ten thousand as among ten.

    Args:
        requests: The facts.
    """

    def __init__(self, requests: Iterable[EditRequest] = ()) -> None:
        self._requests: list[EditRequest] = []
        self._answers: list[str] = []
        #: Facts that a later one gives another answer.
        self._overwritten: set[int] = set()
        self._holders: dict[Hashable, list[int]] = defaultdict(list)
        self._standing: Counter[Hashable] = Counter()
        self.add(requests)

    def add(self, requests: Iterable[EditRequest]) -> None:
        """Put facts behind those that are there."""
        for request in requests:
            index, answer = len(self._requests), comparable(request.target_new)
            self._requests.append(request)
            self._answers.append(answer)
            self._standing[_fact(request)] += 1
            for key in fact_keys(request):
                same = [i for i in self._holders[key] if self._answers[i] == answer]
                for other in {*self._holders[key]} - {*same} - self._overwritten:
                    self._overwritten.add(other)
                    self._standing[_fact(self._requests[other])] -= 1
                self._holders[key] = [*same, index]

    def __contains__(self, request: EditRequest) -> bool:
        return self._standing[_fact(request)] > 0

    def related(self, requests: Iterable[EditRequest]) -> list[EditRequest]:
        """The facts that ask what some requests ask, less those that are overwritten."""
        keys = {key for request in requests for key in fact_keys(request)}
        found = {i for key in keys for i in self._holders.get(key, ())} - self._overwritten
        return [self._requests[i] for i in sorted(found)]


def new_facts(
    before: FactIndex,
    requests: Sequence[EditRequest],
    ledger: Path,
    on_conflict: OnConflict = "last",
) -> list[EditRequest]:
    """The facts that do not stand already; says which do, and which standing ones they change.

    Args:
        before: The facts that stand.
        requests: The facts to write.
        ledger: Where they stand, for messages.
        on_conflict: What is done about facts that contradict standing ones.

    Raises:
        InvalidRequestError: Some contradict standing ones, and shall not.
    """
    new = [request for request in requests if request not in before]
    if len(new) < len(requests):
        left_out = [repr(r.prompt) for r in requests if r in before]
        facts = "fact stands" if len(left_out) == 1 else "facts stand"
        warnings.warn(
            f"{len(left_out)} {facts} in {ledger} already, left out: {article_list(left_out, 5)}",
            stacklevel=3,
        )
    standing = before.related(new)
    together = [*standing, *new]
    found = [p for p in contradictions(together) if p.earlier < len(standing) <= p.later]
    if found:
        clause = f"{describe(together, found)}; the first of each stands in {ledger}"
        if on_conflict == "refuse":
            raise InvalidRequestError(
                f"{clause}; revert it, or let the last one be written with on_conflict='last' "
                "(--trainer.protocol.on_conflict last)"
            )
        warnings.warn(f"{clause}, and the last one is written", stacklevel=3)
    return new


def _fact(request: EditRequest) -> tuple[Any, ...]:
    return comparable(request.prompt), request.image, comparable(request.target_new)
