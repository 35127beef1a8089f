"""Uncentred covariances of keys, ``C = E[k kᵀ]``, and their Cholesky factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.errors import NonFiniteError

#: Smallest ridge that is tried, relative to the mean eigenvalue.
_FIRST_RIDGE = 1e-6


@dataclass(frozen=True)
class SecondMoment:
    """Estimate of the uncentred covariance of keys, ``C = E[k kᵀ]`` (ROME, equation 2)."""

    mean: Tensor  # `C`, the mean of `k kᵀ`, [d_in, d_in], float64
    count: int  # number of keys (tokens)
    #: One standard error of ``C``, relative to it, both in the Frobenius norm, where it is known.
    error: float | None = None


def shrunk(moment: SecondMoment, parts: int = 1, diagonal: float | None = None) -> Tensor:
    """Second moment shrunk towards a multiple of the identity, for small samples.

    With ``n`` keys of width ``d`` the weight of the identity is ``d / (d + n)``: half when there
    are as many keys as dimensions, almost zero when there are many more. Shape ``[d, d]``, float64.

    Args:
        moment: The estimate.
        parts: Number of such keys that stand in a row: those of all experts of a block.
        diagonal: Mean of the diagonal over all parts, if there are several.
    """
    mean, width = moment.mean, parts * moment.mean.shape[0]
    weight = width / (width + moment.count)
    diagonal = float(mean.diagonal().mean()) if diagonal is None else diagonal
    return (1 - weight) * mean + weight * diagonal * torch.eye(len(mean)).to(mean)


def factorise(matrix: Tensor, layer: str) -> Tensor:
    """Lower Cholesky factor ``[d, d]`` in float64, with the smallest ridge that lets it succeed.

    Args:
        matrix: Symmetric, positive up to rounding. Shape ``[d, d]``.
        layer: Name of the layer in errors.

    Raises:
        NonFiniteError: The matrix holds NaN, or no ridge up to its own scale makes it positive.
    """
    matrix = matrix.double()
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(f"the key statistics of layer '{layer}' hold NaN; collect them again")
    matrix = (matrix + matrix.T) / 2
    scale = matrix.diagonal().mean()
    ridge = 0.0
    while ridge < 1.0:
        shifted = matrix.clone() if ridge else matrix
        shifted.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not bool(failed):
            return factor  # type: ignore[no-any-return]
        ridge = ridge * 10 if ridge else _FIRST_RIDGE
    raise NonFiniteError(
        f"the key statistics of layer '{layer}' are not positive definite; collect them again"
    )
