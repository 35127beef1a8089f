"""What is done to updates after they were solved: RECT, PRUNE, SPHERE, and making one edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import CompositeEdit, DenseEdit, Edit, EditOrigin, LowRankEdit
from kedit_lightning.edits.effects import AddToOutput
from kedit_lightning.edits.projections import oriented
from kedit_lightning.errors import UnsupportedUseError


def keep_largest(delta: Tensor, weight: Tensor, share: float) -> Tensor:
    """Keep the entries that change a weight most, relative to itself (RECT, arXiv 2401.04700).

    Args:
        delta: The update. Shape ``[d_out, d_in]``.
        weight: What it is added to. Shape ``[d_out, d_in]``.
        share: Share of the entries that stay.
    """
    count = round(share * delta.numel())
    if count >= delta.numel():
        return delta
    change = (delta / weight).abs().nan_to_num(0.0, torch.inf).flatten()
    kept = torch.zeros_like(change, dtype=torch.bool)
    kept[change.topk(count).indices] = True
    return delta * kept.reshape(delta.shape)


def restrained(a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compress singular values above the largest one of the weight (PRUNE, arXiv 2405.16821).

    ``σ`` becomes ``ln σ − ln σ_max + σ_max`` there.

    Args:
        a: Shape ``[n, d_in]``.
        b: Shape ``[d_out, n]``.
        weight: What ``b a`` is added to. Shape ``[d_out, d_in]``.
    """
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, sigma, v = torch.linalg.svd(upper @ lower.T)
    largest = torch.linalg.matrix_norm(weight.to(sigma), 2)
    beyond = sigma > largest
    if not bool(beyond.any()):
        return a, b
    sigma = torch.where(beyond, sigma.log() - largest.log() + largest, sigma)
    return v @ right.T, (left @ u) * sigma


def off_main_directions(a: Tensor, weight: Tensor, strength: float, energy: float = 0.5) -> Tensor:
    """Take an update off the directions in which most rows of a weight lie (SPHERE, 2510.01172).

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
    """Weight of a projection, ``[d_out, d_in]`` in float64, on its device.

    Args:
        base: The base model.
        module: Name of the projection.
        edited: Whether the edits on the stack count.

    Raises:
        UnsupportedUseError: The weight is quantised, so that it holds no numbers to compare with.
    """
    owner = base.module(module)
    weight = owner.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise UnsupportedUseError(
            f"the weight of '{module}' is quantised; keep_share, restrain and off_main compare a "
            "change with it, so load the base model without quantization, or leave them out"
        )
    total = oriented(weight.double(), owner)
    for effect in base.edits.effects(AddToOutput) if edited else ():
        if effect.module != module:
            continue
        if effect.delta.low_rank is not None:
            a, b = effect.delta.low_rank
            total = total + b.to(total) @ a.to(total)
        if effect.delta.dense is not None:
            total = total + effect.delta.dense.to(total)
    return total


def combined(
    base: BaseModel, changes: Sequence[Edit], origin: EditOrigin, memory: Mapping[str, Tensor]
) -> Edit:
    """The changes of several modules as one edit, with what later edits must know."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    dense: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for change in changes:
        if isinstance(change, LowRankEdit):
            factors |= change.factors
        elif isinstance(change, DenseEdit):
            dense |= change.changes
    if not dense:
        return LowRankEdit(base, factors, origin, memory)
    whole = DenseEdit(base, dense, origin)
    if not memory:
        return whole
    return CompositeEdit(base, [LowRankEdit(base, {}, origin, memory), whole], origin)
