"""How far the edited model's answers differ from the base model's.

The comparison is with the base model's own answers, right or wrong; correctness plays no part.
Functions of tensors raise a ``ValueError`` for shapes that do not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning.metrics.functional.teacher_forcing import widened


def unchanged_text(base: str, edited: str) -> bool:
    """Whether two generated texts are the same, character by character.

    Nothing is normalised: greedy decoding of an unchanged model is deterministic.

    >>> unchanged_text(" Paris.", " Paris."), unchanged_text(" Paris.", " paris.")
    (True, False)
    """
    return base == edited


def unchanged_top1(base_ids: Tensor, edited_ids: Tensor, mask: Tensor) -> Tensor:
    """Whether the arg-max is the same at every position, for each row.

    The share of unchanged positions, which older tools call locality, is
    ``token_match(edited_ids, base_ids, mask)``.

    Ids and ``mask``, True at the positions to compare, are ``[rows, tokens]``; the result is
    ``[rows]``, True for a row without positions.

    >>> base = torch.tensor([[1, 2, 3], [1, 2, 3]])
    >>> edited = torch.tensor([[1, 2, 9], [1, 9, 3]])
    >>> mask = torch.tensor([[True, True, False], [True, True, True]])
    >>> unchanged_top1(base, edited, mask).tolist()
    [True, False]
    """
    if base_ids.dim() != 2 or not base_ids.shape == edited_ids.shape == mask.shape:
        raise ValueError(
            "`base_ids`, `edited_ids` and `mask` must all be [rows, tokens], got "
            f"{list(base_ids.shape)}, {list(edited_ids.shape)} and {list(mask.shape)}"
        )
    return ((base_ids == edited_ids) | ~mask.bool()).all(dim=1)


def rank_agreement(base: Tensor, edited: Tensor, mask: Tensor, ranks: int) -> Tensor:
    """Share of positions and ranks at which the likeliest tokens are the same, for each row.

    Of each position the ``ranks`` likeliest tokens are compared in their order, so that two that
    change places count twice. Logits are ``[rows, tokens, vocab]``; ``mask``, True at the positions
    to compare, is ``[rows, tokens]``. The result is ``[rows]``, NaN for a row without positions.

    >>> base = torch.tensor([[[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]])
    >>> edited = torch.tensor([[[3.0, 1.0, 2.0], [3.0, 2.0, 1.0]]])
    >>> rank_agreement(base, edited, torch.ones(1, 2), ranks=1).item()
    1.0
    >>> round(rank_agreement(base, edited, torch.ones(1, 2), ranks=3).item(), 3)
    0.667
    """
    if base.dim() != 3 or base.shape != edited.shape or mask.shape != base.shape[:2]:
        raise ValueError(
            "`base` and `edited` must both be [rows, tokens, vocab] and `mask` [rows, tokens], got "
            f"{list(base.shape)}, {list(edited.shape)} and {list(mask.shape)}"
        )
    ranks = min(ranks, base.shape[-1])
    equal = base.topk(ranks).indices == edited.topk(ranks).indices
    share = equal.double().mean(-1).masked_fill(~mask.bool(), 0.0)
    return share.sum(1) / mask.bool().sum(1)


def kl_divergence(base_log_probs: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
    """Mean over positions of KL(base || edited), for each row, in nats.

    Half precision is widened to float32 first. Identical input gives exactly 0. Tokens that the
    base model rules out add nothing, whatever the edited model makes of them.

    Log-probabilities are ``[rows, tokens, vocab]``; ``mask``, True at the positions to compare, is
    ``[rows, tokens]``. The result is ``[rows]``, NaN for a row without positions.

    >>> base = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    >>> edited = torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]).log()
    >>> mask = torch.tensor([[True, True]])
    >>> round(kl_divergence(base, edited, mask).item(), 4)  # half of ln(2 / sqrt(3))
    0.0719
    >>> kl_divergence(base, base, mask).item()
    0.0
    """
    if base_log_probs.dim() != 3 or base_log_probs.shape != log_probs.shape:
        raise ValueError(
            "`base_log_probs` and `log_probs` must both be [rows, tokens, vocab], "
            f"got {list(base_log_probs.shape)} and {list(log_probs.shape)}"
        )
    if mask.shape != log_probs.shape[:2]:
        raise ValueError(
            f"`mask` must be [rows, tokens] = {list(log_probs.shape[:2])}, got {list(mask.shape)}"
        )
    base, edited = widened(base_log_probs), widened(log_probs)
    weight = base.exp()
    terms = torch.where(weight == 0, 0.0, weight * (base - edited))
    # The sum is never negative in exact arithmetic; rounding may bring it to -1e-8.
    per_position = terms.sum(dim=2).clamp_min(0.0)  # [rows, tokens]
    mask = mask.bool()
    per_position = per_position.masked_fill(~mask, 0.0)
    return per_position.sum(dim=1) / mask.sum(dim=1).to(per_position.dtype)
