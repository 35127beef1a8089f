"""Losses that several methods share, as functions of logits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kedit_lightning.errors import UnsupportedUseError


def answer_nll(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of each row's answer, in at least float32.

    Args:
        logits: Those that predict the answer tokens. Shape ``[batch, width, vocab]``, or
            ``[batch, 1, vocab]`` where one position predicts them all.
        ids: The answer tokens. Shape ``[batch, width]``.
        mask: Where ``ids`` is no padding. Shape ``[batch, width]``.

    Returns:
        Shape ``[batch]``.
    """
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    log_probs = log_probs.expand(-1, ids.shape[1], -1)
    chosen = log_probs.gather(-1, ids[..., None])[..., 0]
    return mean_nll(chosen, mask)


def mean_nll(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of each row's answer, 0 for rows without one.

    Args:
        log_probs: Those of the answer tokens. Shape ``[batch, width]``.
        mask: Where they are no padding. Shape ``[batch, width]``.

    Returns:
        Shape ``[batch]``.
    """
    return -(log_probs * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def gradients_of(loss: Tensor, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a loss with respect to tensors that act inside a model.

    Raises:
        UnsupportedUseError: The model keeps none.
    """
    check_reached(loss)
    return torch.autograd.grad(loss, list(tensors))


def check_reached(loss: Tensor) -> None:
    """Check that a loss depends on what is trained inside a model.

    Raises:
        UnsupportedUseError: It does not.
    """
    if not loss.requires_grad:
        raise UnsupportedUseError(
            "no gradient reaches what is to be trained in the blocks of this model, as those of a "
            "Reformer keep none; use IKE, or another method that trains nothing"
        )
