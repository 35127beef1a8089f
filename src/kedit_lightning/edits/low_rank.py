"""A change of a weight as the product of two thin matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LowRankDelta(NamedTuple):
    """``Δ = B A``: the output of the projection becomes ``y + (x Aᵀ) Bᵀ``.

    Args:
        a: ``A``, what reads the input. Shape ``[rank, d_in]``.
        b: ``B``, what writes the output. Shape ``[d_out, rank]``.
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """Number of terms."""
        return self.a.shape[0]

    @property
    def dense(self) -> Tensor:
        """``Δ``. Shape ``[d_out, d_in]``."""
        return self.b @ self.a

    def change(self, x: Tensor) -> Tensor:
        """What is added to the output, ``[..., d_out]``, in the dtype of ``x``, ``[..., d_in]``."""
        return (x @ self.a.to(x.dtype).T) @ self.b.to(x.dtype).T

    def to(self, target: torch.dtype | torch.device) -> LowRankDelta:
        """The same in another dtype, or on another device."""
        return LowRankDelta(self.a.to(target), self.b.to(target))
