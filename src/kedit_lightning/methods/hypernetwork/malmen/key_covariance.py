"""The keys that a fit has met, and the size of a shift by what it does to them."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning.methods.training.distributed import sum_over_ranks
from kedit_lightning.methods.training.precision import FullPrecision
from kedit_lightning.statistics.covariance import SecondMoment, shrunk


class KeyMoment(FullPrecision):
    """Mean of ``k kᵀ`` over the keys of one projection that were seen while it was fitted.

    Args:
        width: ``d_in``.
        dtype: Number type of the mean.
    """

    mean: Tensor
    count: Tensor

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, width, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, keys: Tensor) -> None:
        """Take in keys ``[n, d_in]``, those of all ranks where there are several.

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
        """``M`` for which ``tr(Sᵀ M S)`` is the size of a shift ``S``; ``None`` before any key.

        It is the mean, shrunk for small samples, with a mean diagonal of 1, so that it is the
        squared norm of ``S`` where keys are alike in all directions. Shape ``[d_in, d_in]``,
        float64.
        """
        if int(self.count) == 0:
            return None
        mean = shrunk(SecondMoment(self.mean.double(), int(self.count)))
        return mean / mean.diagonal().mean()
