"""The outer loss of meta-learning: probes of the model while the edit of an episode is attached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kedit_lightning.base_models import BaseModel, TokenRows
from kedit_lightning.base_models.taps import Visit, visiting
from kedit_lightning.edits import LowRankDelta
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.shared.answer_passes import answered_rows
from kedit_lightning.methods.training.episodes import Episode
from kedit_lightning.requests import Probe

#: A delta ``Δ`` of one weight: its low-rank factors, or the matrix itself, ``[d_out, d_in]``.
Delta: TypeAlias = LowRankDelta | Tensor


#: An answer that is surer than this many nats gives no gradient of unlikelihood.
_LEAST_SURPRISE = 1e-6


@contextmanager
def attached(
    model: nn.Module,
    deltas: Mapping[str, Delta],
    edit_of_row: Tensor,
    edit_of_term: Mapping[str, Tensor],
) -> Iterator[None]:
    """Add deltas to the outputs of projections, where each row of a batch carries its own edit.

    The gradients are those of adding the dense delta to the weight, which is never built.

    Args:
        model: The model.
        deltas: Deltas by module name, those of all edits of the batch together.
        edit_of_row: Number of the edit that each row carries. Shape ``[batch]``.
        edit_of_term: Number of the edit that each rank-one term of a low-rank delta belongs to, by
            module name. Shape ``[rank]`` each. Where absent, every row carries all terms.
    """

    def visit(name: str, delta: Delta) -> Visit:
        factors = (delta,) if isinstance(delta, Tensor) else (delta.a, delta.b)
        mask = _mask(edit_of_term.get(name), edit_of_row)

        def add(x: Tensor, y: Tensor) -> Tensor:
            dtype = compute_dtype(y.dtype)
            with torch.autocast(y.device.type, enabled=False):
                first, *rest = (factor.to(y.device, dtype) for factor in factors)
                change = x.to(dtype) @ first.T
                if mask is not None:
                    change = change * mask.to(change)
                for second in rest:
                    change = change @ second.T
                return (y.to(dtype) + change).to(y.dtype)

        return add

    with visiting(model, {name: visit(name, delta) for name, delta in deltas.items()}):
        yield


def _mask(edit_of_term: Tensor | None, edit_of_row: Tensor) -> Tensor | None:
    """The terms of each row's edit, ``[batch, 1, rank]``; ``None`` where rows carry all terms."""
    if edit_of_term is None:
        return None
    mask = edit_of_row[:, None].to(edit_of_term.device) == edit_of_term[None]
    return None if bool(mask.all()) else mask[:, None]


def request_rows(base: BaseModel, episodes: Sequence[Episode]) -> tuple[TokenRows, Tensor]:
    """Token rows of all requests, and the number of the episode of each, ``[batch]``."""
    requests = [request for episode in episodes for request in episode.requests]
    return answered_rows(base, requests), _numbers([len(episode.requests) for episode in episodes])


@dataclass(frozen=True)
class OuterLosses:
    """The parts of the outer loss of each episode. Shape ``[episodes]`` each.

    Args:
        edit: Mean negative log-likelihood of the tokens of new answers, and mean unlikelihood of
            the answers to avoid.
        locality: Mean KL divergence from the base model at the tokens of unrelated answers.
        success: Share of new answers whose tokens are all arg-max.
    """

    edit: Tensor
    locality: Tensor
    success: Tensor


def outer_losses(
    base: BaseModel,
    episodes: Sequence[Episode],
    deltas: Mapping[str, Delta],
    edit_of_term: Mapping[str, Tensor],
) -> OuterLosses:
    """Losses of the probes of each episode, with its own edit attached.

    Args:
        base: The base model; the deltas come on top of the edits on its stack.
        episodes: The episodes.
        deltas: Deltas by module name.
        edit_of_term: Number of the episode that each rank-one term of a delta belongs to, by module
            name. Shape ``[rank]`` each. Where absent, every episode carries all terms.
    """
    asked = [probe for episode in episodes for probe in episode.asked]
    kept = [probe for episode in episodes for probe in episode.kept]
    avoided = [probe for episode in episodes for probe in episode.avoided]
    asked_of = _numbers([len(episode.asked) for episode in episodes])
    kept_of = _numbers([len(episode.kept) for episode in episodes])
    avoided_of = _numbers([len(episode.avoided) for episode in episodes])
    rows = probe_rows(base, [*asked, *kept, *avoided])
    edit_of_row = torch.cat([asked_of, kept_of, avoided_of])
    with attached(base.model, deltas, edit_of_row, edit_of_term):
        after = _log_probs(base, rows)
    first, last = len(asked), len(asked) + len(kept)
    answers, mask = rows.answer_ids[:first], rows.answer_mask[:first]
    nll = -after[:first].gather(-1, answers[..., None])[..., 0]
    success = ((after[:first].argmax(-1) == answers) | ~mask).all(-1)[:, None].to(nll)
    divergence, kept_mask = _divergence(base, kept, after[first:last])
    count = len(episodes)
    edit = _mean(nll, mask, asked_of, count)
    if avoided:
        fed = after[last:].gather(-1, rows.answer_ids[last:, :, None])[..., 0]
        unlikely = unlikelihood(fed, rows.answer_mask[last:])[:, None]
        edit = edit + _mean(unlikely, torch.ones_like(unlikely), avoided_of, count)
    return OuterLosses(
        edit=edit,
        locality=_mean(divergence, kept_mask, kept_of, count),
        success=_mean(success, torch.ones_like(success), asked_of, count),
    )


def unlikelihood(log_probs: Tensor, mask: Tensor) -> Tensor:
    """``-log(1 - p)`` of each answer, ``p`` the geometric mean of its tokens' probabilities.

    Not that of the whole answer, which is next to nothing for long ones. Shape ``[rows]``.

    Args:
        log_probs: Log-probabilities of the answer's tokens. Shape ``[rows, tokens]``.
        mask: True at tokens of the answer. Shape ``[rows, tokens]``.

    >>> halves = torch.tensor([[0.5, 0.5], [0.9, 0.4]]).log()
    >>> surprise = unlikelihood(halves, torch.tensor([[True, True], [True, False]]))
    >>> [round(value, 3) for value in surprise.exp().tolist()]
    [2.0, 10.0]
    """
    mean = (log_probs * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return -torch.log(-torch.expm1(mean.clamp(max=-_LEAST_SURPRISE)))


def _divergence(base: BaseModel, kept: Sequence[Probe], after: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence from the base model's answers, and its token mask. ``[batch, width]`` each.

    Args:
        base: The base model, without the deltas.
        kept: The unrelated probes.
        after: Log-probabilities with the deltas. Shape ``[batch, at least width, vocab]``.
    """
    if not kept:
        return after[..., 0], torch.ones_like(after[..., 0])
    rows = probe_rows(base, kept)
    with torch.no_grad():
        before = _log_probs(base, rows)
    mask = rows.answer_mask.clone()
    mask[:, 0] = True  # a probe without an answer is compared at its next token
    return (before.exp() * (before - after[:, : mask.shape[1]])).sum(-1), mask


def _numbers(counts: Sequence[int]) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def probe_rows(base: BaseModel, probes: Sequence[Probe]) -> TokenRows:
    """Token rows of probes, with the first of their answers where they have any."""
    answers = [probe.answers[0] if probe.answers else None for probe in probes]
    return base.rows([p.prompt for p in probes], answers, images=[p.image for p in probes])


def _log_probs(base: BaseModel, rows: TokenRows) -> Tensor:
    """Log-probabilities of answers, ``[batch, width, vocab]``, in at least float32."""
    logits = base.answer_logits(rows)
    return logits.to(compute_dtype(logits.dtype)).log_softmax(-1)


def _mean(values: Tensor, mask: Tensor, episode_of_row: Tensor, episodes: int) -> Tensor:
    """Mean over the masked tokens of each episode. ``[episodes]`` from ``[batch, width]``."""
    where = episode_of_row.to(values.device)
    zeros = torch.zeros(episodes, dtype=values.dtype, device=values.device)
    sums = zeros.index_add(0, where, (values * mask).sum(-1))
    counts = zeros.index_add(0, where, mask.to(values).sum(-1))
    return sums / counts.clamp(min=1)
