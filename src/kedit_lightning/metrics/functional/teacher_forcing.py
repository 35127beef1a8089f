"""Scores of an answer whose tokens are fed to the model (teacher forcing).

The model sees the right prefix and length, so these numbers bound those of free generation from
above; most papers report them. Token ids, log-probabilities and masks, which are True at answer
tokens, are ``[rows, tokens]``, results ``[rows]``. Other shapes raise a ``ValueError``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def widened(values: Tensor) -> Tensor:
    """Values in at least float32: half precision is converted, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dim() != 2 or value.shape != other.shape:
        raise ValueError(
            f"`{name}` and `{other_name}` must both be [rows, tokens], "
            f"got {list(value.shape)} and {list(other.shape)}"
        )


def token_match(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Share of answer tokens that are arg-max, NaN for a row without any. Shape ``[rows]``.

    ``predicted`` are the arg-max ids at the positions that predict the answer, ``target`` its ids.
    Both, and ``mask``, are ``[rows, tokens]``.

    >>> predicted = torch.tensor([[5, 7, 9], [5, 0, 0]])
    >>> target = torch.tensor([[5, 7, 8], [5, 6, 0]])
    >>> mask = torch.tensor([[True, True, True], [True, True, False]])
    >>> [round(share, 3) for share in token_match(predicted, target, mask).tolist()]
    [0.667, 0.5]
    """
    _check("predicted", predicted, "target", target)
    _check("predicted", predicted, "mask", mask)
    mask = mask.bool()
    return ((predicted == target) & mask).sum(dim=1) / mask.sum(dim=1)


def exact_match(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Whether every answer token is arg-max, False for a row without any. Shape ``[rows]``.

    Greedy decoding then generates the answer, though it may go on after it. The arguments are
    those of :func:`token_match`.

    >>> predicted = torch.tensor([[5, 7, 9], [5, 6, 0]])
    >>> target = torch.tensor([[5, 7, 8], [5, 6, 9]])
    >>> mask = torch.tensor([[True, True, True], [True, True, False]])
    >>> exact_match(predicted, target, mask).tolist()
    [False, True]
    """
    _check("predicted", predicted, "target", target)
    _check("predicted", predicted, "mask", mask)
    mask = mask.bool()
    return ((predicted == target) | ~mask).all(dim=1) & mask.any(dim=1)


def mean_log_prob(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Mean log-probability of the answer tokens in nats, NaN for a row without any.

    Both arguments are ``[rows, tokens]``; the result is ``[rows]``, at least float32.

    >>> log_probs = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -1.0, -1.5]])
    >>> mask = torch.tensor([[True, True, False], [True, True, True]])
    >>> mean_log_prob(log_probs, mask).tolist()
    [-1.5, -1.0]
    """
    total = total_log_prob(log_probs, mask)
    return total / mask.bool().sum(dim=1).to(total.dtype)


def total_log_prob(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of the whole answer in nats; shapes are those of :func:`mean_log_prob`.

    >>> total_log_prob(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[1, 1, 0]])).tolist()
    [-3.0]
    """
    _check("log_probs", log_probs, "mask", mask)
    # Not a product with the mask: a padding position may hold -inf.
    return widened(log_probs).masked_fill(~mask.bool(), 0.0).sum(dim=1)


def prefers(
    new_log_probs: Tensor,
    old_log_probs: Tensor,
    new_mask: Tensor | None = None,
    old_mask: Tensor | None = None,
    reduction: Literal["mean", "total"] = "mean",
) -> Tensor:
    """Whether the new answer is more likely than the old one, ``P(new) > P(old)``, for each row.

    For answers of unequal length the reduction matters. ``mean`` compares mean log-probabilities a
    token, as the released code of ROME and MEMIT does for efficacy, paraphrase and neighbourhood;
    ``total`` compares the probabilities of whole answers, as the papers' formula reads, and favours
    the shorter one. A tie is not a preference.

    Args:
        new_log_probs: Log-probabilities of the new answer's tokens. Shape ``[rows, new_tokens]``.
        old_log_probs: The same of the old answer. Shape ``[rows, old_tokens]``.
        new_mask: True at answer tokens; all of them when ``None``. Shape ``[rows, new_tokens]``.
        old_mask: The same of the old answer. Shape ``[rows, old_tokens]``.
        reduction: ``mean`` over tokens or their ``total``.

    >>> new, old = torch.tensor([[-0.6, -0.6]]), torch.tensor([[-1.0]])
    >>> prefers(new, old).tolist(), prefers(new, old, reduction="total").tolist()
    ([True], [False])

    Source: Meng et al. 2022 (arXiv 2202.05262), section 3.3.
    """
    new_mask = torch.ones_like(new_log_probs, dtype=torch.bool) if new_mask is None else new_mask
    old_mask = torch.ones_like(old_log_probs, dtype=torch.bool) if old_mask is None else old_mask
    if new_log_probs.shape[:1] != old_log_probs.shape[:1]:
        raise ValueError(
            "`new_log_probs` and `old_log_probs` must have equally many rows, "
            f"got {list(new_log_probs.shape)} and {list(old_log_probs.shape)}"
        )
    pool = mean_log_prob if reduction == "mean" else total_log_prob
    return pool(new_log_probs, new_mask) > pool(old_log_probs, old_mask)
