"""The update that makes a linear layer map keys to wanted values."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning.errors import NonFiniteError

#: Below this cosine between a key and its whitened counterpart an update would blow up.
MIN_ALIGNMENT = 1e-3


def ridge_update(
    keys: Tensor, residuals: Tensor, factor: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Low-rank solution of ``Δ = R (εI + Kᵀ G⁻¹ K)⁻¹ Kᵀ G⁻¹``.

    It minimises ``tr(Δ G Δᵀ) + ‖ΔK − R‖² / ε``; with ``ε = 0`` it meets ``ΔK = R`` exactly.

    Args:
        keys: ``K``. Shape ``[d_in, n]``.
        residuals: ``R``, wanted minus present output. Shape ``[d_out, n]``.
        factor: Lower Cholesky factor of ``G``. Shape ``[d_in, d_in]``, float64.
        eps: Weight of keeping other keys against meeting the residuals.

    Returns:
        ``A`` of shape ``[n, d_in]`` and ``B`` of shape ``[d_out, n]`` with ``Δ = B A``, float64.
    """
    keys, residuals = keys.to(factor), residuals.to(factor)
    whitened = torch.cholesky_solve(keys, factor)
    gram = keys.T @ whitened + eps * torch.eye(keys.shape[1]).to(factor)
    return whitened.T, torch.linalg.solve(gram, residuals.T).T


def rank_one_update(
    key: Tensor, residual: Tensor, direction: Tensor, factor: Tensor, layer: str
) -> tuple[Tensor, Tensor]:
    """ROME's update: adds ``residual`` where the layer sees ``key``, along a whitened direction.

    ``Δ = r (C⁻¹ d)ᵀ / (kᵀ C⁻¹ d)`` (Meng et al. 2022, eq. 2; with ``d = k`` it is the constrained
    least-squares solution).

    Args:
        key: Key ``k`` that is to get the new value. Shape ``[d_in]``.
        residual: Wanted minus present output at ``key``. Shape ``[d_out]``.
        direction: ``d``, the key or a mean of keys over contexts. Shape ``[d_in]``.
        factor: Lower Cholesky factor of ``C``. Shape ``[d_in, d_in]``, float64.
        layer: Name for the error.

    Returns:
        ``A`` of shape ``[1, d_in]`` and ``B`` of shape ``[d_out, 1]``, float64.

    Raises:
        NonFiniteError: ``k`` is nearly orthogonal to ``C⁻¹ d``, so the update would explode.
    """
    key, residual, direction = key.to(factor), residual.to(factor), direction.to(factor)
    left = torch.cholesky_solve(direction[:, None], factor)[:, 0]
    overlap = key @ left
    alignment = overlap.abs() / (key.norm() * left.norm())
    if not bool(alignment >= MIN_ALIGNMENT):
        raise NonFiniteError(
            f"the update of layer '{layer}' would explode: the key of the bare prompt is almost "
            f"orthogonal to the mean key (cosine {float(alignment):.1e}); use RROME, which takes "
            "the mean key throughout, or put words before the subject"
        )
    return left[None], (residual / overlap)[:, None]
