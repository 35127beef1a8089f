"""What a file of facts holds, before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from kedit_lightning.character_forms import comparable
from kedit_lightning.contradictions import contradictions
from kedit_lightning.requests import EditExample, EditRequest


@dataclass(frozen=True)
class ProbeCount:
    """The probes of one group."""

    kind: str
    group: str
    probes: int
    #: Examples that have such a probe.
    examples: int
    #: Probes without an answer, which ask whether the base model's own one stays.
    without_answer: int


@dataclass(frozen=True)
class Description:
    """Counts of a split.

    Args:
        examples: Number of examples.
        requests: Number of facts to write.
        without_subject: Facts that name no subject.
        duplicates: Facts that an earlier one states too, with the same prompt and answer.
        conflicts: Prompts that come with different answers.
        probes: Counts of each group of probes.
        characters: Smallest, median and largest number of characters, by what is measured.
    """

    examples: int
    requests: int
    without_subject: int
    duplicates: int
    conflicts: int
    probes: tuple[ProbeCount, ...]
    characters: dict[str, tuple[int, int, int]]


def described(examples: Sequence[EditExample]) -> Description:
    """Count what examples hold."""
    requests = [request for example in examples for request in example.requests]
    conflicting = {comparable(requests[pair.earlier].prompt) for pair in contradictions(requests)}
    return Description(
        len(examples),
        len(requests),
        sum(request.subject is None for request in requests),
        _duplicates(requests),
        len(conflicting),
        tuple(_probe_counts(examples)),
        {
            "prompt": _spread(len(request.prompt) for request in requests),
            "target_new": _spread(len(request.target_new) for request in requests),
        },
    )


def _duplicates(requests: Sequence[EditRequest]) -> int:
    counts = Counter((comparable(one.prompt), comparable(one.target_new)) for one in requests)
    return sum(count - 1 for count in counts.values())


def _spread(lengths: Iterable[int]) -> tuple[int, int, int]:
    values = sorted(lengths)
    return (values[0], round(median(values)), values[-1]) if values else (0, 0, 0)


def _probe_counts(examples: Sequence[EditExample]) -> list[ProbeCount]:
    probes, holders, open_ones = (Counter[tuple[str, str]]() for _ in range(3))
    for example in examples:
        names = [(probe.kind, probe.group) for probe in example.probes]
        probes.update(names)
        holders.update(set(names))
        open_ones.update((p.kind, p.group) for p in example.probes if not p.answers)
    return [
        ProbeCount(kind, group, count, holders[kind, group], open_ones[kind, group])
        for (kind, group), count in sorted(probes.items())
    ]
