"""Arithmetic of decoding by earlier layers: DoLa (Chuang et al. 2024) and DeCo (Wang et al. 2025).

All functions take logits in full precision and treat each row by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Divergence below which two layers say the same, up to rounding.
_SAME = 1e-7
#: Score of a token that is excluded: the published value, which leaves log-likelihoods finite.
EXCLUDED = -1000.0


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Divergence of two distributions, half KL(p || m) and half KL(q || m) with their mean m.

    Args:
        first: Log-probabilities, shape ``[..., vocab]``.
        second: The same.

    Returns:
        Nats, from 0 to log 2. Shape ``[...]``.
    """
    mean = torch.logaddexp(first, second) - torch.log(torch.tensor(2.0, dtype=first.dtype))
    return (_kl(first, mean) + _kl(second, mean)) / 2


def reversed_jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """The divergence of DoLa's released code: KL from the mean to each distribution.

    Its mean over the vocabulary, a constant factor that picks the same layer, is left out; so is
    that over the batch, by which a row's answer depends on the rows beside it.

    Args:
        first: Log-probabilities, shape ``[..., vocab]``.
        second: The same.
    """
    mean = torch.logaddexp(first, second) - torch.log(torch.tensor(2.0, dtype=first.dtype))
    return (_kl(mean, first) + _kl(mean, second)) / 2


def _kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


def dola(logits: Tensor, early: Tensor, relative_top: float, legacy: bool = False) -> Tensor:
    """Contrast the last layer with the one that differs most from it.

    Args:
        logits: Of the last layer, ``[n, vocab]``.
        early: Of the candidate layers, ``[layers, n, vocab]``.
        relative_top: Tokens less likely than this share of the likeliest one are excluded (α).
        legacy: Choose the layer by the divergence of the released code.

    Returns:
        ``log q_N - log q_M`` of tokens that are plausible; others are excluded. Where all candidate
        layers say what the last one says there is nothing to contrast, and it is ``log q_N``.
        ``[n, vocab]``.
    """
    last, before = logits.log_softmax(-1), early.log_softmax(-1)
    divergence = reversed_jensen_shannon if legacy else jensen_shannon
    furthest, chosen = divergence(last.expand_as(before), before).max(0)
    premature = before[chosen, torch.arange(len(last), device=last.device)]
    premature = premature.masked_fill((furthest < _SAME)[:, None], 0.0)
    bar = last.amax(-1, keepdim=True) + torch.tensor(relative_top, dtype=last.dtype).log()
    return torch.where(last >= bar, last - premature, EXCLUDED)


def candidate_tokens(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """Which tokens DeCo chooses among: the likeliest, up to a number and a probability.

    The likeliest token is always one.

    Args:
        logits: Shape ``[n, vocab]``.
        top_p: Largest sum of their probabilities.
        top_k: Largest number of them.

    Returns:
        Truth values, ``[n, vocab]``.
    """
    found = logits.softmax(-1).topk(min(top_k, logits.shape[-1]), dim=-1)
    kept = found.values.cumsum(-1) <= top_p
    kept[..., 0] = True
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, found.indices, kept)


def deco(logits: Tensor, early: Tensor, alpha: float, top_p: float, top_k: int) -> Tensor:
    """Add the logits of the layer that is surest of a candidate, weighted by how sure it is.

    Args:
        logits: Of the last layer, ``[n, vocab]``.
        early: Of the preceding layers, ``[layers, n, vocab]``.
        alpha: Weight of the correction.
        top_p: Largest sum of the candidates' probabilities.
        top_k: Largest number of candidates.

    Returns:
        ``l_N + alpha p_A l_A`` of candidates; others are excluded. ``[n, vocab]``.
    """
    candidates = candidate_tokens(logits, top_p, top_k)
    sure = early.softmax(-1).masked_fill(~candidates, 0.0).amax(-1)
    best, anchor = sure.max(0)
    corrected = logits + alpha * best[:, None] * early[anchor, torch.arange(len(logits))]
    return torch.where(candidates, corrected, EXCLUDED)
