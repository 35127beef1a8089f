"""Training episodes of meta-learning: requests to write, with probes of the edited model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from kedit_lightning.requests import EditExample, EditRequest, Probe, ProbeKind

Item = TypeVar("Item")


@dataclass(frozen=True)
class Episode:
    """One edit of a training step, with the probes of its outer loss.

    Args:
        requests: The requests that the edit writes (inner loss).
        asked: Probes whose new answers are learned (edit loss).
        kept: Unrelated probes whose answers must not change (locality loss).
        avoided: Probes whose answers should become unlikely (edit loss).
    """

    requests: tuple[EditRequest, ...]
    asked: tuple[Probe, ...]
    kept: tuple[Probe, ...]
    avoided: tuple[Probe, ...] = ()


def rotate(items: Sequence[Item], count: int, epoch: int, *key: object) -> list[Item]:
    """Take ``count`` items, the next ones in each epoch, from a start that ``key`` fixes.

    >>> rotate("abc", 2, epoch=0), rotate("abc", 2, epoch=1)
    (['b', 'c'], ['a', 'b'])
    """
    text = "/".join(map(str, key)).encode()
    start = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") + epoch * count
    return [items[(start + i) % len(items)] for i in range(min(count, len(items)))]


def probes_of(examples: Sequence[EditExample], kind: ProbeKind) -> list[Probe]:
    """The probes of one kind of some examples."""
    return [probe for example in examples for probe in example.probes if probe.kind == kind]


def alternatives(examples: Sequence[EditExample]) -> dict[str, list[str]]:
    """For each old answer, the new answers that some request gives instead of it."""
    new: dict[str, set[str]] = {}
    for request in (request for example in examples for request in example.requests):
        if request.target_old is not None:
            new.setdefault(request.target_old, set()).add(request.target_new)
    return {old: sorted(answers) for old, answers in new.items()}


def with_another_target(
    example: EditExample, known: Mapping[str, Sequence[str]], epoch: int, seed: int
) -> EditExample:
    """The example with the epoch's new answer out of those known for its old answer.

    ``known`` are new answers by old answer, from :func:`alternatives`. Only examples of one request
    are changed; those of several stay as they are.
    """
    request = example.requests[0]
    targets = known.get(request.target_old or "", ())
    if len(example.requests) > 1 or not targets:
        return example
    (target,) = rotate(targets, 1, epoch, seed, "target", example.id)
    probes = [
        replace(probe, answers=(target,)) if probe.kind in ("rewrite", "rephrase") else probe
        for probe in example.probes
        if probe.kind != "portability"  # what follows from another answer is not known
    ]
    return EditExample((replace(request, target_new=target),), tuple(probes), example.id)


def with_unlikelihood(episode: Episode) -> Episode:
    """The episode with all answers of its probes learned, and those they are against avoided.

    Each answer becomes a probe of its own. Probes that are against nothing stay as they are.
    """
    asked, avoided = list[Probe](), list[Probe]()
    for probe in episode.asked:
        against = probe.task.against if probe.task else ()
        answers = probe.answers if against else ()
        asked += [replace(probe, answers=(text,)) for text in answers] or [probe]
        avoided += [replace(probe, answers=(text,)) for text in against]
    return replace(episode, asked=tuple(asked), avoided=tuple(avoided))


def make_episodes(
    examples: Sequence[EditExample],
    size: int = 1,
    epoch: int = 0,
    seed: int = 0,
    rephrases: int = 1,
    locality: int = 1,
    own_wording: bool = False,
) -> list[Episode]:
    """Episodes of ``size`` examples each, whose requests one edit writes.

    Each epoch takes the next ``rephrases`` and ``locality`` probes of an example, which needs at
    least one rephrase; without locality probes of its own it takes those of the others.
    ``own_wording`` adds the requests' own prompts to the rephrases.
    """
    all_locality = probes_of(examples, "locality")
    episodes = []
    for start in range(0, len(examples), size):
        asked: list[Probe] = []
        kept: list[Probe] = []
        members = examples[start : start + size]
        for example in members:
            unrelated = probes_of([example], "locality") or all_locality
            asked += rotate(probes_of([example], "rephrase"), rephrases, epoch, seed, example.id)
            kept += rotate(unrelated, locality, epoch, seed, example.id)
        requests = [request for example in members for request in example.requests]
        if own_wording:
            asked += [Probe("rewrite", r.prompt, (r.target_new,), image=r.image) for r in requests]
        episodes.append(Episode(tuple(requests), tuple(asked), tuple(kept)))
    return episodes
