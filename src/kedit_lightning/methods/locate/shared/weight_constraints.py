"""Constraints on a solved update that depend on the weight: RECT, PRUNE and SPHERE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.mixture import is_mixture, split_by_expert
from kedit_lightning.edits import LowRankDelta
from kedit_lightning.edits.effects import AddToOutput, WeightDelta
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.edits.weight_storage import matrix_of
from kedit_lightning.errors import UnsupportedUseError


@dataclass(frozen=True)
class WeightConstraints:
    """Constraints on an update, in the order they apply: SPHERE, PRUNE, RECT."""

    off_main: float = 0.0
    restrain: bool = False
    keep_share: float | None = None

    def check(self, base: BaseModel, modules: Sequence[str]) -> None:
        """Raise an ``UnsupportedUseError`` if there is one and a module is that of experts."""
        some = bool(self.off_main) or self.restrain or self.keep_share is not None
        routed = [name for name in modules if is_mixture(base.module(name))]
        if some and routed:
            raise UnsupportedUseError(
                "keep_share, restrain and off_main compare a change with one weight, and the "
                f"experts in '{routed[0]}' have one each; leave them out"
            )

    def changes(self, base: BaseModel, module: str, delta: LowRankDelta) -> dict[str, WeightDelta]:
        """A change of a projection by name; of all experts of a block, those of single ones."""
        projection = base.module(module)
        if not is_mixture(projection):
            return {module: self.constrained(base, module, delta)}
        dtype = compute_dtype(base.dtype)
        parts = split_by_expert(projection, delta)
        return {name: WeightDelta(part.to(dtype)) for name, part in parts.items()}

    def constrained(self, base: BaseModel, module: str, delta: LowRankDelta) -> WeightDelta:
        """The constrained update of one projection, dense if few entries stay."""
        if self.off_main:
            weight = weight_of(base, module, edited=True)
            delta = delta._replace(a=off_main_directions(delta.a, weight, self.off_main))
        if self.restrain:
            delta = restrained(delta, weight_of(base, module, edited=False))
        dtype = compute_dtype(base.dtype)
        if self.keep_share is None:
            return WeightDelta(delta.to(dtype))
        weight = weight_of(base, module, edited=True)
        kept = keep_largest(delta.dense, weight, self.keep_share)
        return WeightDelta(None, kept.to(dtype))


def keep_largest(delta: Tensor, weight: Tensor, share: float) -> Tensor:
    """Keep the entries that change a weight most, relative to itself (RECT, arXiv 2401.04700).

    Args:
        delta: The update. Shape ``[d_out, d_in]``.
        weight: The weight. Shape ``[d_out, d_in]``.
        share: Share of the entries that stay.
    """
    count = round(share * delta.numel())
    if count >= delta.numel():
        return delta
    change = (delta / weight).abs().nan_to_num(0.0, torch.inf).flatten()
    kept = torch.zeros_like(change, dtype=torch.bool)
    kept[change.topk(count).indices] = True
    return delta * kept.reshape(delta.shape)


def restrained(delta: LowRankDelta, weight: Tensor) -> LowRankDelta:
    """Compress singular values above the largest one of the weight (PRUNE, arXiv 2405.16821).

    ``σ`` becomes ``ln σ − ln σ_max + σ_max`` there.

    Args:
        delta: The update.
        weight: The weight. Shape ``[d_out, d_in]``.
    """
    left, upper = torch.linalg.qr(delta.b)
    right, lower = torch.linalg.qr(delta.a.T)
    u, sigma, v = torch.linalg.svd(upper @ lower.T)
    largest = torch.linalg.matrix_norm(weight.to(sigma), 2)
    above = sigma > largest
    if not bool(above.any()):
        return delta
    sigma = torch.where(above, sigma.log() - largest.log() + largest, sigma)
    return LowRankDelta(v @ right.T, (left @ u) * sigma)


def off_main_directions(a: Tensor, weight: Tensor, strength: float, energy: float = 0.5) -> Tensor:
    """Take an update off the main directions of the rows of a weight (SPHERE, 2510.01172).

    ``A`` becomes ``A (I − α U Uᵀ)`` with ``U`` the fewest right singular vectors of the normalised
    rows that hold a share of their energy.

    Args:
        a: Input side of the update. Shape ``[n, d_in]``.
        weight: The weight as it is edited now. Shape ``[d_out, d_in]``.
        strength: ``α``; with 1 nothing is left in these directions.
        energy: Share of the energy that the directions hold.
    """
    rows = weight.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    # The smaller of the two Gram matrices has the same spectrum.
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    count = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    basis = rows.T @ vectors[:, :count] / values[:count].sqrt()
    left: Tensor = a - strength * (a @ basis.to(a)) @ basis.to(a).T
    return left


def weight_of(base: BaseModel, module: str, edited: bool) -> Tensor:
    """Weight of a projection, with or without edits. ``[d_out, d_in]``, float64, on its device.

    Raises:
        UnsupportedUseError: The weight is quantised in a way that cannot be read.
    """
    try:
        total = matrix_of(base.module(module)).double()
    except UnsupportedUseError as error:
        raise UnsupportedUseError(f"module '{module}': {error}") from error
    for effect in base.edits.effects(AddToOutput) if edited else ():
        change = effect.delta.matrix(total) if effect.module == module else None
        total = total if change is None else total + change
    return total
