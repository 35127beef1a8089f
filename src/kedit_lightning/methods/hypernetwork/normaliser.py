"""Running mean and variance that survive checkpoints, ranks and precision plugins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

#: Mean, sum of squared deviations, and number of rows.
Moments = tuple[Tensor, Tensor, Tensor]


class FullPrecision(nn.Module):
    """A module whose tensors move between devices but keep their number types.

    Precision plugins turn a module's parameters and buffers into 16 bit, where a counter stops at
    256 and small steps of an optimizer vanish.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.detach().new_empty(0)).device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]


def moments(rows: Tensor) -> Moments:
    """Mean, sum of squared deviations and count of rows ``[n, width]``; zeros without rows."""
    count = torch.tensor(len(rows), dtype=torch.int64, device=rows.device)
    mean = rows.sum(0) / count.clamp(min=1)
    return mean, (rows - mean).square().sum(0), count


def merge(first: Moments, second: Moments) -> Moments:
    """Moments of the union of two sets of rows.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm".
    """
    (mean_a, squares_a, count_a), (mean_b, squares_b, count_b) = first, second
    count = count_a + count_b
    share = count_b.to(mean_a) / count.clamp(min=1)
    apart = mean_b - mean_a
    squares = squares_a + squares_b + apart.square() * count_a * share
    return mean_a + apart * share, squares, count


class RunningNormaliser(FullPrecision):
    """Brings rows to mean 0 and standard deviation 1, with statistics of all rows seen.

    Statistics change in :meth:`update` only; they are buffers, so that checkpoints hold them.

    Args:
        width: Values a row.
        dtype: Number type of the statistics.
    """

    #: Added to the standard deviation, as in the released code.
    EPSILON = 1e-7
    mean: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, dtype=dtype))
        self.register_buffer("squares", torch.zeros(width, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Take in rows ``[n, width]``, those of all ranks where there are several.

        Rows that hold NaN or infinity are left out.
        """
        rows = rows.detach().to(self.mean)
        new = moments(rows[torch.isfinite(rows).all(-1)])
        total: Moments = (self.mean, self.squares, self.count)
        for other in _of_all_ranks(new):
            total = merge(total, other)
        for buffer, value in zip((self.mean, self.squares, self.count), total, strict=True):
            buffer.copy_(value)

    def forward(self, rows: Tensor) -> Tensor:
        """Normalise rows ``[n, width]``; unchanged before two rows have been seen."""
        if int(self.count) < 2:
            return rows
        deviation = (self.squares / (self.count - 1)).sqrt()
        return (rows - self.mean) / (deviation + self.EPSILON)


def _of_all_ranks(new: Moments) -> list[Moments]:
    """The moments of every rank, in the same order on each, so that all ranks stay equal."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [new]
    gathered = []
    for tensor in new:
        parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, tensor)
        gathered.append(parts)
    return list(zip(*gathered, strict=True))
