"""The losses of T-Patcher on what a patch does when it fires, and when it is silent.

Huang et al. 2023, equations 6 to 9.
"""

from __future__ import annotations

import torch
from torch import Tensor


def activation_loss(activations: Tensor) -> Tensor:
    """``exp(-a)`` for each patch: it shall fire on its own query.

    Args:
        activations: ``a = q·k + b``, before the rectifier. Shape ``[n]``.

    Returns:
        Shape ``[n]``.
    """
    return (-activations).exp()


def memory_loss(scores: Tensor, activations: Tensor, margin: float, top: int) -> Tensor:
    """``l_m1 + l_m2`` for each patch: it shall be silent on the memory, by a margin.

    ``l_m1`` is the mean of ``exp(s + margin)`` over the ``top`` largest scores, ``l_m2`` that of
    ``exp(s - a + margin)``; the paper's β and γ are ``-margin``.

    Args:
        scores: ``s = m·k + b`` of the patch on each query of the memory, ``-inf`` where a query is
            none for that patch. Shape ``[n, memory]``.
        activations: ``a``, those on the patch's own query. Shape ``[n]``.
        margin: Distance of silent scores from zero, and from the patch's own.
        top: How many scores count.

    Returns:
        Shape ``[n]``, 0 without a memory.
    """
    if not scores.shape[1]:
        return torch.zeros_like(activations)
    largest = scores.topk(min(top, scores.shape[1]), dim=1).values
    counted = largest.isfinite().sum(1).clamp(min=1)
    silent, apart = largest + margin, largest - activations[:, None] + margin
    return (silent.exp() + apart.exp()).sum(1) / counted
