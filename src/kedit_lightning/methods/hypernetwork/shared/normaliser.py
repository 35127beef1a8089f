"""Normalisation with a running mean and variance, synchronised over ranks."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from kedit_lightning.methods.shared.moments import Moments, merge, moments
from kedit_lightning.methods.training.distributed import several_ranks
from kedit_lightning.methods.training.precision import FullPrecision


class RunningNormaliser(FullPrecision):
    """Standardises rows with the mean and standard deviation of all rows seen in training.

    The statistics change in :meth:`update` only; they are buffers, so that checkpoints hold them.

    Args:
        width: Width of a row.
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
        """Update the statistics with rows ``[n, width]``, and with those of the other ranks.

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
    if not several_ranks():
        return [new]
    gathered = []
    for tensor in new:
        parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, tensor)
        gathered.append(parts)
    return list(zip(*gathered, strict=True))
