"""Statistics of the factors of a fit, updated with the rows of all ranks and kept as buffers."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from kedit_lightning.methods.shared.moments import Moments, merge, moments
from kedit_lightning.methods.training.distributed import several_ranks, sum_over_ranks
from kedit_lightning.methods.training.trained_network import FullPrecision
from kedit_lightning.statistics.covariance import SecondMoment, shrunk


class RunningNormaliser(FullPrecision):
    """Standardises rows ``[n, width]`` by mean and deviation of all rows seen in training."""

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


class KeyCovariance(FullPrecision):
    """Mean of ``k kᵀ`` over the keys ``[n, width]`` of a projection in a fit (not centred)."""

    mean: Tensor
    count: Tensor

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, width, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, keys: Tensor) -> None:
        """Update the mean with keys ``[n, d_in]``, and with those of the other ranks.

        Keys that hold NaN or infinity are left out.
        """
        keys = keys.detach().to(self.mean.device).double()
        keys = keys[torch.isfinite(keys).all(-1)]
        products, count = keys.T @ keys, torch.full_like(self.count, len(keys))
        sum_over_ranks([products, count])
        self.count += count
        self.mean += (products - count * self.mean) / self.count.clamp(min=1)

    @property
    def metric(self) -> Tensor | None:
        """``M`` of the size ``tr(Sᵀ M S)`` of a shift ``S``; ``None`` before any key.

        It is the mean, shrunk for small samples and scaled to a mean diagonal of 1, so that the
        size is the squared norm of ``S`` for isotropic keys. Shape ``[d_in, d_in]``, float64.
        """
        if int(self.count) == 0:
            return None
        mean = shrunk(SecondMoment(self.mean.double(), int(self.count)))
        return mean / mean.diagonal().mean()
