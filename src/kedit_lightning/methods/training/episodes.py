"""Training episodes: what is written, what is asked afterwards, and what must stay."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from kedit_lightning.requests import EditExample, EditRequest, Probe, ProbeKind

Item = TypeVar("Item")


@dataclass(frozen=True)
class Episode:
    """One edit that is tried in training.

    Args:
        requests: The facts to write.
        asked: Questions whose answers must follow the edit.
        kept: Unrelated questions, whose answers must not.
    """

    requests: tuple[EditRequest, ...]
    asked: tuple[Probe, ...]
    kept: tuple[Probe, ...]


def rotate(items: Sequence[Item], count: int, turn: int, *key: object) -> list[Item]:
    """Take ``count`` items, the next ones at each turn, starting at a place that ``key`` fixes.

    >>> rotate("abc", 2, turn=0), rotate("abc", 2, turn=1)
    (['b', 'c'], ['a', 'b'])
    """
    text = "/".join(map(str, key)).encode()
    start = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") + turn * count
    return [items[(start + i) % len(items)] for i in range(min(count, len(items)))]


def probes_of(examples: Sequence[EditExample], kind: ProbeKind) -> list[Probe]:
    """The probes of one kind of some examples."""
    return [probe for example in examples for probe in example.probes if probe.kind == kind]


def alternatives(examples: Sequence[EditExample]) -> dict[str, list[str]]:
    """For each old answer, the new answers that some request gives instead of it."""
    found: dict[str, set[str]] = {}
    for request in (request for example in examples for request in example.requests):
        if request.target_old is not None:
            found.setdefault(request.target_old, set()).add(request.target_new)
    return {old: sorted(new) for old, new in found.items()}


def with_another_target(
    example: EditExample, known: Mapping[str, Sequence[str]], turn: int, seed: int
) -> EditExample:
    """The example with the next of the answers that are known in place of its old one.

    Only examples of one request are changed; those of several stay as they are.

    Args:
        example: The example.
        known: New answers by old answer, from :func:`alternatives`.
        turn: Number of the pass over the data.
        seed: Fixes the answer an example starts with.
    """
    request = example.requests[0]
    targets = known.get(request.target_old or "", ())
    if len(example.requests) > 1 or not targets:
        return example
    (target,) = rotate(targets, 1, turn, seed, "target", example.id)
    probes = [
        replace(probe, answers=(target,)) if probe.kind in ("rewrite", "rephrase") else probe
        for probe in example.probes
        if probe.kind != "portability"  # what follows from another answer is not known
    ]
    return EditExample((replace(request, target_new=target),), tuple(probes), example.id)


def make_episodes(
    examples: Sequence[EditExample],
    size: int = 1,
    turn: int = 0,
    seed: int = 0,
    rephrases: int = 1,
    locality: int = 1,
    own_wording: bool = False,
) -> list[Episode]:
    """Draw episodes that write the requests of ``size`` examples together.

    An example without locality probes borrows those of the others.

    Args:
        examples: The examples; each has rephrases.
        size: Examples an episode.
        turn: Number of the pass over the data; each pass asks the next probes of an example.
        seed: Fixes the probe that an example starts with.
        rephrases: Rephrases asked an example.
        locality: Locality probes asked an example.
        own_wording: Ask the requests' own prompts too.
    """
    lent = probes_of(examples, "locality")
    episodes = []
    for start in range(0, len(examples), size):
        asked: list[Probe] = []
        kept: list[Probe] = []
        members = examples[start : start + size]
        for example in members:
            own = probes_of([example], "locality") or lent
            asked += rotate(probes_of([example], "rephrase"), rephrases, turn, seed, example.id)
            kept += rotate(own, locality, turn, seed, example.id)
        requests = [request for example in members for request in example.requests]
        if own_wording:
            asked += [Probe("rewrite", r.prompt, (r.target_new,)) for r in requests]
        episodes.append(Episode(tuple(requests), tuple(asked), tuple(kept)))
    return episodes
