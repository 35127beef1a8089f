"""Requests that cannot hold together: one fact with different answers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

from kedit_lightning.character_forms import comparable
from kedit_lightning.errors import InvalidRequestError, UnsupportedUseError, article_list
from kedit_lightning.requests import EditExample, EditRequest

#: What is done about requests that contradict each other: the ``last`` one is written, or none.
OnConflict: TypeAlias = Literal["last", "refuse"]

#: Contradictions that a message shows.
_SHOWN = 5
# Words and marks that two wordings of one relation may differ in, and what stands for the subject.
_FILLERS = frozenset(["the", "a", "an"])
_ENDS = frozenset(["is", "are", ":", "?", ","])  # not "was": a past fact is another one
_QUESTIONS = re.compile(r"^(?:what|which|who) (?:is|are)(?= )|^(?:what|who)'s(?= )")
_SUBJECT = "\0"


class Contradiction(NamedTuple):
    """A request that a later one of the same fact overwrites."""

    earlier: int
    later: int


def contradictions(requests: Sequence[EditRequest]) -> list[Contradiction]:
    """Pairs of requests that give one fact different answers, each earlier request once.

    Requests are of one fact where their prompts are equal; where they have the same subject and
    word the same relation ("France's capital is", "The capital of France is"); and where subject,
    task and old target are the same. All is compared whatever its Unicode form, case and white
    space. Other wordings of a fact are not recognised.
    """
    holders: dict[Hashable, list[int]] = defaultdict(list)
    answers = [comparable(request.target_new) for request in requests]
    found: dict[int, int] = {}
    for index, request in enumerate(requests):
        for fact in fact_keys(request):
            same = holders[fact]
            for earlier in same:
                if answers[earlier] != answers[index]:
                    found.setdefault(earlier, index)
            holders[fact] = [i for i in same if answers[i] == answers[index]] + [index]
    return [Contradiction(earlier, later) for earlier, later in sorted(found.items())]


def consistent(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests without those that a later one overwrites."""
    overwritten = {pair.earlier for pair in contradictions(requests)}
    return [request for index, request in enumerate(requests) if index not in overwritten]


def overwritten(examples: Iterable[EditExample]) -> frozenset[tuple[str, int]]:
    """The requests that a later one overwrites: the id of their example, and their place in it."""
    placed = [
        ((example.id, place), request)
        for example in examples
        for place, request in enumerate(example.requests)
    ]
    found = contradictions([request for _, request in placed])
    return frozenset(placed[pair.earlier][0] for pair in found)


def remaining(
    examples: Iterable[EditExample], left_out: Collection[tuple[str, int]]
) -> list[EditRequest]:
    """The requests of examples in order, without those that :func:`overwritten` names."""
    return [
        request
        for example in examples
        for place, request in enumerate(example.requests)
        if (example.id, place) not in left_out
    ]


def describe(requests: Sequence[EditRequest], found: Sequence[Contradiction]) -> str:
    """Name the requests of contradictions, as a clause."""
    prompts = {comparable(requests[pair.earlier].prompt) for pair in found}
    shown = [_named(requests[pair.earlier], requests[pair.later]) for pair in found]
    return (
        f"{len(prompts)} prompt{'s' * (len(prompts) > 1)} with contradictory targets: "
        f"{article_list(shown, _SHOWN)}"
    )


def settle(requests: Sequence[EditRequest], on_conflict: OnConflict) -> list[EditRequest]:
    """The requests to write, and nothing that a later one would overwrite.

    Raises:
        InvalidRequestError: Some contradict each other and shall not; names them.
        UnsupportedUseError: ``on_conflict`` is unknown.
    """
    if on_conflict not in get_args(OnConflict):
        known = " or ".join(get_args(OnConflict))
        raise UnsupportedUseError(f"on_conflict must be {known}, got {on_conflict!r}")
    if on_conflict == "refuse" and (found := contradictions(requests)):
        raise InvalidRequestError(
            f"{describe(requests, found)}; take one of each pair out, or let the last one be "
            "written with on_conflict='last' (--trainer.protocol.on_conflict last)"
        )
    return consistent(requests)


def _named(earlier: EditRequest, later: EditRequest) -> str:
    places = [f" (record {r.id!r})" if r.id is not None else "" for r in (earlier, later)]
    other = "" if earlier.prompt == later.prompt else f" for {later.prompt!r}"
    return (
        f"{earlier.prompt!r} with {earlier.target_new!r}{places[0]} and "
        f"{later.target_new!r}{other}{places[1]}"
    )


def fact_keys(request: EditRequest) -> Iterator[Hashable]:
    """Keys that requests of one fact share, at least one of them.

    Args:
        request: The request.
    """
    image = request.image
    yield comparable(request.prompt), image
    if request.subject is not None:
        subject = comparable(request.subject)
        if wording := _wording(comparable(request.prompt), subject):
            yield subject, wording, image
        if request.task is not None and request.target_old is not None:
            yield subject, request.task, comparable(request.target_old), image


def _wording(prompt: str, subject: str) -> tuple[str, ...]:
    """The words that say which relation of the subject a prompt asks for.

    Articles, a leading question word and a closing copula say nothing, and a possessive stands
    behind its noun. The order of words is kept: who is whose father hangs on it.

    >>> _wording("france's capital is", "france") == _wording("the capital of france is", "france")
    True
    """
    text = _QUESTIONS.sub("", prompt.replace(subject, _SUBJECT))
    words = re.findall(rf"{_SUBJECT}(?:'s?)?|[\w']+|[^\w\s]", text)
    words = [word for word in words if word not in _FILLERS]
    while words and words[-1] in _ENDS:
        words.pop()
    if len(words) > 1 and words[0] in (f"{_SUBJECT}'s", f"{_SUBJECT}'"):
        words = [*words[1:], "of", _SUBJECT]
    return tuple(words) if set(words) - {_SUBJECT} else ()
