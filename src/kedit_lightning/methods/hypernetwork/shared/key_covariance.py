"""The covariance of the keys of a fit, which measures the size of a parameter shift."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning.methods.training.distributed import sum_over_ranks
from kedit_lightning.methods.training.precision import FullPrecision
from kedit_lightning.statistics.covariance import SecondMoment, shrunk


class KeyCovariance(FullPrecision):
    """Mean of ``k kᵀ`` over the keys of one projection in a fit (not centred).

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
