"""Training episodes of hypernetworks: what is written, what is asked, and the loss afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, TokenRows
from kedit_lightning.edits.modules import compute_dtype
from kedit_lightning.methods.hypernetwork.attach import LowRankChange, attached
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


def request_rows(base: BaseModel, episodes: Sequence[Episode]) -> tuple[TokenRows, Tensor]:
    """Rows of all requests, and the number of the episode that each belongs to, ``[batch]``."""
    requests = [request for episode in episodes for request in episode.requests]
    rows = base.rows([r.prompt for r in requests], [r.target_new for r in requests])
    return rows, _numbers([len(episode.requests) for episode in episodes])


@dataclass(frozen=True)
class Losses:
    """What episodes cost. Shape ``[episodes]`` each.

    Args:
        edit: Negative log-likelihood of the new answers, a token.
        locality: KL divergence of the unrelated answers from the base model's, a token.
        right: Share of new answers whose tokens are all arg-max.
    """

    edit: Tensor
    locality: Tensor
    right: Tensor


def episode_losses(
    base: BaseModel, episodes: Sequence[Episode], changes: dict[str, LowRankChange]
) -> Losses:
    """Ask the questions of each episode with its own edit attached.

    Args:
        base: The base model; the changes come on top of the edits on its stack.
        episodes: The episodes.
        changes: Changes by module name; their edits are numbered as the episodes are.
    """
    asked = [probe for episode in episodes for probe in episode.asked]
    kept = [probe for episode in episodes for probe in episode.kept]
    asked_of = _numbers([len(episode.asked) for episode in episodes])
    kept_of = _numbers([len(episode.kept) for episode in episodes])
    rows = _probe_rows(base, [*asked, *kept])
    with attached(base.model, changes, torch.cat([asked_of, kept_of])):
        after = _log_probs(base, rows)
    first = len(asked)
    answers, mask = rows.answer_ids[:first], rows.answer_mask[:first]
    nll = -after[:first].gather(-1, answers[..., None])[..., 0]
    right = ((after[:first].argmax(-1) == answers) | ~mask).all(-1)[:, None].to(nll)
    divergence, kept_mask = _divergence(base, kept, after[first:])
    count = len(episodes)
    return Losses(
        edit=_mean(nll, mask, asked_of, count),
        locality=_mean(divergence, kept_mask, kept_of, count),
        right=_mean(right, torch.ones_like(right), asked_of, count),
    )


def _divergence(base: BaseModel, kept: Sequence[Probe], after: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence from the present answers, and where it counts. ``[batch, width]`` each.

    Args:
        base: The base model, without the changes that are tried.
        kept: The questions.
        after: Log-probabilities with the changes. Shape ``[batch, at least width, vocab]``.
    """
    if not kept:
        return after[..., 0], torch.ones_like(after[..., 0])
    rows = _probe_rows(base, kept)
    with torch.no_grad():
        before = _log_probs(base, rows)
    mask = rows.answer_mask.clone()
    mask[:, 0] = True  # without an answer of its own, a question counts by its next token
    return (before.exp() * (before - after[:, : mask.shape[1]])).sum(-1), mask


def _numbers(counts: Sequence[int]) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def _probe_rows(base: BaseModel, probes: Sequence[Probe]) -> TokenRows:
    answers = [probe.answers[0] if probe.answers else None for probe in probes]
    return base.rows([probe.prompt for probe in probes], answers)


def _log_probs(base: BaseModel, rows: TokenRows) -> Tensor:
    """``[batch, width, vocab]``, in at least float32."""
    logits = base.answer_logits(rows)
    return logits.to(compute_dtype(logits.dtype)).log_softmax(-1)


def _mean(values: Tensor, mask: Tensor, episode_of_row: Tensor, episodes: int) -> Tensor:
    """Mean over the masked tokens of each episode. ``[episodes]`` from ``[batch, width]``."""
    where = episode_of_row.to(values.device)
    zeros = torch.zeros(episodes, dtype=values.dtype, device=values.device)
    sums = zeros.index_add(0, where, (values * mask).sum(-1))
    counts = zeros.index_add(0, where, mask.to(values).sum(-1))
    return sums / counts.clamp(min=1)
