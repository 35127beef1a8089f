"""Changes of a weight as products of two thin matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class LowRankDelta(NamedTuple):
    """``Δ = B A``: ``A [rank, d_in]``, ``B [d_out, rank]``; outputs become ``y + (x Aᵀ) Bᵀ``."""

    a: Tensor
    b: Tensor

    @classmethod
    def sum(cls, deltas: Sequence[LowRankDelta]) -> LowRankDelta:
        """The sum of low-rank changes; their ranks add up."""
        a = torch.cat([delta.a for delta in deltas])
        return cls(a, torch.cat([delta.b for delta in deltas], dim=1))

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


@dataclass(frozen=True)
class LowRankBatch:
    """Low-rank changes of several edits, for rows that carry one of them each.

    Ranks are padded with zeros, which change nothing, so one batched product serves all rows.

    Args:
        deltas: ``a`` of shape ``[edits, rank, d_in]`` and ``b`` of shape ``[edits, d_out, rank]``.
        index: The edit of each row. Shape ``[rows]``.
    """

    deltas: LowRankDelta
    index: Tensor

    @classmethod
    def of(cls, groups: Sequence[tuple[Sequence[int], LowRankDelta]]) -> LowRankBatch:
        """Stack the changes of groups of rows; row ``i`` is the ``i``-th of all their rows."""
        a = _padded([delta.a for _, delta in groups])
        b = _padded([delta.b.T for _, delta in groups]).mT
        counts = torch.tensor([len(rows) for rows, _ in groups])
        index = torch.arange(len(groups)).repeat_interleave(counts)
        return cls(LowRankDelta(a, b), index.to(a.device))

    def change(self, x: Tensor) -> Tensor:
        """What is added to the output, ``[rows · copies, tokens, d_out]``.

        Args:
            x: Shape ``[rows · copies, tokens, d_in]``; copies of a row are neighbours.
        """
        # Copies of a row are treated as further tokens of it.  The factors are gathered at each
        # call: one copy for each row would take many times the memory of the edits.
        flat = x.reshape(len(self.index), -1, x.shape[-1])
        hidden = flat @ self.deltas.a[self.index].to(x.dtype).mT
        change = hidden @ self.deltas.b.mT[self.index].to(x.dtype)
        return change.reshape(*x.shape[:-1], -1)


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return pad_sequence([tensor.to(dtype) for tensor in tensors], batch_first=True)
