"""Least-squares updates that make a linear layer map keys to values.

All methods of this family solve ``Δ = R (εI + Kᵀ G⁻¹ K)⁻¹ Kᵀ G⁻¹`` and differ in the prior ``G``,
the cost ``tr(Δ G Δᵀ)`` of a change.  A prior is a function that gives ``G⁻¹ K`` for keys ``K``, so
that priors compose and no ``d × d`` system is solved for a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kedit_lightning.edits import LowRankDelta
from kedit_lightning.errors import NonFiniteError

#: Below this cosine between a key and its whitened counterpart an update would blow up.
MIN_ALIGNMENT = 1e-3

#: How many times the weight of a key grows when another key is equal to it. With EMMET's weight of
#: 1e-3 the change of two or four wordings of a fact stays as large as that of one; the eighth power
#: leaves keys of different facts (cosines below 0.5) alone.
NEAR = 100.0

#: ``G⁻¹ K`` from ``K``; both of shape ``[d_in, n]``, float64.
Prior: TypeAlias = Callable[[Tensor], Tensor]


def covariance_prior(factor: Tensor, weight: float = 1.0) -> Prior:
    """``G = weight · C``: a change keeps the outputs at keys of plain text (MEMIT, eq. 14).

    Args:
        factor: Lower Cholesky factor of ``C``. Shape ``[d_in, d_in]``, float64.
        weight: ``λ``, how many keys of plain text count against one of the batch.
    """
    return lambda keys: torch.cholesky_solve(keys.to(factor), factor).to(keys) / weight


def size_prior(weight: float = 1.0) -> Prior:
    """``G = weight · I``: a change costs its squared Frobenius norm, in keys of norm 1."""
    return lambda keys: keys / weight


def null_space_prior(basis: Tensor, weight: float) -> Prior:
    """``G⁻¹ = P / weight``: a change lies in the null space of the keys (AlphaEdit, eq. 8).

    Args:
        basis: Orthonormal basis of the complement of the null space. Shape ``[d_in, r]``, float64.
        weight: ``L2``, the cost of the squared norm of the change.
    """

    def whiten(keys: Tensor) -> Tensor:
        local = keys.to(basis)
        return ((local - basis @ (basis.T @ local)) / weight).to(keys)

    return whiten


def blockwise_prior(parts: Sequence[Callable[[], Prior]]) -> Prior:
    """``G`` of blocks on the diagonal: those of experts of a mixture, whose keys stand in a row.

    A block that no key reaches is not asked for: its part of ``G⁻¹ K`` is zero.
    """

    def whiten(keys: Tensor) -> Tensor:
        blocks = keys.tensor_split(len(parts))
        solved = (p()(k) if bool(k.any()) else k for p, k in zip(parts, blocks, strict=True))
        return torch.cat(list(solved))

    return whiten


def with_history(prior: Prior, keys: Tensor) -> Prior:
    """``G + H Hᵀ``: a change keeps the outputs at earlier keys as well (Woodbury's identity).

    ``H``, of shape ``[d_in, N]``, holds the keys of earlier edits.  With a null-space prior this is
    the recursive least-squares state of AlphaEdit.
    """
    if keys.shape[1] > keys.shape[0]:
        # Any H with the same H Hᵀ will do: this one has no more columns than rows.
        keys = torch.linalg.qr(keys.T, mode="r").R.T
    whitened = prior(keys)
    inner = torch.eye(keys.shape[1]).to(keys) + symmetric(keys.T @ whitened)
    factor = torch.linalg.cholesky(inner)

    def whiten(new: Tensor) -> Tensor:
        plain = prior(new)
        return plain - whitened @ torch.cholesky_solve(keys.T @ plain, factor)

    return whiten


def neuron_prior(prior: Prior, chosen: Tensor) -> Prior:
    """``G`` where only some inputs may change: ``(G_SS)⁻¹ K_S``, and zero at the others (NSE).

    It is the Schur complement of the others in ``G⁻¹``, which is formed as a whole.

    Args:
        prior: Gives ``G⁻¹ K``.
        chosen: Mask of the inputs that may change, ``S``. Shape ``[d_in]``.
    """
    inverse = symmetric(prior(torch.eye(len(chosen), dtype=torch.float64, device=chosen.device)))
    across = inverse[chosen][:, ~chosen]
    factor = torch.linalg.cholesky(inverse[~chosen][:, ~chosen])
    within = inverse[chosen][:, chosen] - across @ torch.cholesky_solve(across.T, factor)

    def whiten(keys: Tensor) -> Tensor:
        whitened = torch.zeros_like(keys)
        whitened[chosen] = (within @ keys[chosen].to(within)).to(keys)
        return whitened

    return whiten


def relative_weight(prior: Prior, keys: Tensor, share: float) -> float:
    """``w = share · mean(kᵀ G⁻¹ k)`` over keys: the weight of ``G``, whatever its scale.

    Under ``w G`` a change that is to move a lone key's output moves it ``1 / (1 + share)`` of the
    way: that is ``g / (1 + g)`` with ``g = kᵀ (w G)⁻¹ k``.

    Args:
        prior: Gives ``G⁻¹ K``.
        keys: The keys of facts. Shape ``[d_in, n]``.
        share: Weight of other keys, in those of a typical one of these.
    """
    keys = keys.double()
    return share * float((keys * prior(keys)).sum(0).mean())


def weighted_prior(prior: Prior, weight: float) -> Prior:
    """``w G`` from ``G``."""
    return lambda keys: prior(keys) / weight


def known_priors(prior: Prior, keys: Sequence[Tensor]) -> list[Prior]:
    """For each of several ``K`` the prior that knows ``G⁻¹ K``, all of which are solved at once.

    Args:
        prior: Gives ``G⁻¹ K``.
        keys: Each ``K``. Shape ``[d_in, n]``, float64.
    """
    if len(keys) < 2:
        return [prior for _ in keys]
    solved = prior(torch.cat(list(keys), dim=1)).split([part.shape[1] for part in keys], dim=1)

    def knowing(own: Tensor, whitened: Tensor) -> Prior:
        return lambda new: whitened if torch.equal(new, own) else prior(new)

    return [knowing(own, whitened) for own, whitened in zip(keys, solved, strict=True)]


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part of a matrix that is symmetric but for rounding."""
    return (matrix + matrix.T) / 2


def relative_ridge(gram: Tensor, eps: float) -> Tensor:
    """Weights ``εᵢ`` in units of the mean ``kᵀ G⁻¹ k``, larger for keys that nearly equal others.

    Two wordings of a fact have nearly the same key, and values that differ by what their
    optimisation left open.  A change that meets both exactly grows with the difference over the
    distance of the keys; missing both a little is what they have in common.

    Args:
        gram: ``Kᵀ G⁻¹ K``. Shape ``[n, n]``.
        eps: ``ε`` of a key that is like no other.

    Returns:
        ``ε (1 + NEAR cosᵢ⁸) · mean``, with the largest cosine to another key. Shape ``[n]``.
    """
    norms = gram.diagonal().sqrt()
    cosines = gram / (norms[:, None] * norms)
    nearest = cosines.fill_diagonal_(0).amax(1).clamp(0, 1)
    return eps * gram.diagonal().mean() * (1 + NEAR * nearest**8)


def ridge_update(
    keys: Tensor, residuals: Tensor, prior: Prior, eps: float, relative: bool = False
) -> LowRankDelta:
    """Low-rank solution of ``Δ = R (εI + Kᵀ G⁻¹ K)⁻¹ Kᵀ G⁻¹``.

    It minimises ``tr(Δ G Δᵀ) + ‖ΔK − R‖² / ε``; with ``ε = 0`` it meets ``ΔK = R`` exactly, as long
    as no key is a combination of others.

    Args:
        keys: ``K``. Shape ``[d_in, n]``.
        residuals: ``R``, wanted minus present output. Shape ``[d_out, n]``.
        prior: Gives ``G⁻¹ K``.
        eps: Weight of keeping other keys against meeting the residuals.
        relative: Whether the weight of each key is that of :func:`relative_ridge`.

    Returns:
        ``Δ`` of rank ``n``, float64.

    Raises:
        NonFiniteError: Keys are combinations of each other and ``ε`` is 0.
    """
    keys, residuals = keys.double(), residuals.double()
    whitened = prior(keys)
    gram = symmetric(keys.T @ whitened)
    weights = relative_ridge(gram, eps) if relative else gram.new_full((len(gram),), eps)
    gram = gram + weights.diag()
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed) or not bool(torch.isfinite(factor).all()):
        raise NonFiniteError(
            "the update has no bounded solution: keys of the batch are combinations of each other, "
            "as those of two requests about one subject are, and eps is 0; set eps above 0, or "
            "leave one of them out"
        )
    return LowRankDelta(whitened.T, torch.cholesky_solve(residuals.T, factor).T)


def rank_one_update(
    key: Tensor, residual: Tensor, direction: Tensor, prior: Prior, layer: str
) -> LowRankDelta:
    """ROME's update: maps one key to its value, along a whitened direction.

    ``Δ = r (C⁻¹ d)ᵀ / (kᵀ C⁻¹ d)`` (Meng et al. 2022, eq. 2; with ``d = k`` it is the constrained
    least-squares solution).

    Args:
        key: ``k``. Shape ``[d_in]``.
        residual: ``r``, wanted minus present output at ``key``. Shape ``[d_out]``.
        direction: ``d``, the key or a mean of keys over contexts. Shape ``[d_in]``.
        prior: Gives ``C⁻¹ d``.
        layer: Name for the error.

    Returns:
        ``Δ`` of rank 1, float64.

    Raises:
        NonFiniteError: ``k`` is nearly orthogonal to ``C⁻¹ d``, so the update would explode.
    """
    key, residual, direction = key.double(), residual.double(), direction.double()
    left = prior(direction[:, None])[:, 0]
    overlap = key @ left
    alignment = overlap.abs() / (key.norm() * left.norm())
    if not bool(alignment >= MIN_ALIGNMENT):
        raise NonFiniteError(
            f"the update of layer '{layer}' would explode: the key of the bare prompt is almost "
            f"orthogonal to the mean key (cosine {float(alignment):.1e}); use RROME, which takes "
            "the mean key throughout, or put words before the subject"
        )
    return LowRankDelta(left[None], (residual / overlap)[:, None])
