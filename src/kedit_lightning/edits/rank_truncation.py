"""Changes of weights of any kind as products of two matrices of a given rank at most."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import qr, svd
from torch.nn.functional import pad

from kedit_lightning.edits.edit import Edit, EditableModel
from kedit_lightning.edits.effects import AddToOutput, KeepMemory, WeightDelta
from kedit_lightning.edits.kinds.weights import LowRankEdit
from kedit_lightning.edits.low_rank import LowRankDelta
from kedit_lightning.edits.materialisation import OneOrSeveral, edits_in
from kedit_lightning.errors import UnsupportedUseError, article_list

#: A share of a change below this is what rounding leaves of an exact product.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Truncation:
    """Edits as one low-rank edit.

    Args:
        edit: The edit; it is not applied.
        lost: The share of each change that it lacks, ``‖Δ - Δ_r‖ / ‖Δ‖``, by module.
    """

    edit: LowRankEdit
    lost: dict[str, float]

    @property
    def exact(self) -> bool:
        """Whether all changes are whole, up to rounding."""
        return all(share <= ROUNDING for share in self.lost.values())


def _low_rank_changes(edits: OneOrSeveral[Edit]) -> dict[str, list[LowRankDelta]]:
    """Low-rank changes of edits, by module name."""
    changes: dict[str, list[LowRankDelta]] = {}
    for part in (part for edit in edits_in(edits) for part in edit.parts()):
        for effect in part.effects():
            if isinstance(effect, AddToOutput) and effect.delta.only_low_rank is not None:
                changes.setdefault(effect.module, []).append(effect.delta.only_low_rank)
            elif not isinstance(effect, KeepMemory):
                raise UnsupportedUseError(
                    f"only low-rank edits can be exported as a LoRA adapter, and edit {part.id} by "
                    f"{part.origin.method or 'hand'} is of kind '{part.kind}'; export the full "
                    "model instead, or a change of weights at a rank of your choice (--export_rank)"
                )
    return changes


def joined_factors(edits: OneOrSeveral[Edit]) -> dict[str, LowRankDelta]:
    """The sum of all low-rank changes of each module, by name; their ranks add up.

    Raises:
        UnsupportedUseError: An edit is not low-rank, or none changes anything.
    """
    changes = _low_rank_changes(edits)
    _check_any(changes)
    return {name: LowRankDelta.sum(deltas) for name, deltas in changes.items()}


def _check_any(changes: Collection[str]) -> None:
    if not changes:
        raise UnsupportedUseError(
            "no edit changes a weight, so there is nothing that an adapter could hold"
        )


def of_rank(delta: LowRankDelta, rank: int) -> LowRankDelta:
    """A change on the host, its factors filled up with zeros to a rank."""
    missing = rank - delta.rank
    return LowRankDelta(pad(delta.a.cpu(), (0, 0, 0, missing)), pad(delta.b.cpu(), (0, missing)))


def weight_changes(edits: OneOrSeveral[Edit]) -> dict[str, WeightDelta]:
    """The sum of all changes of each projection, by module name.

    Raises:
        UnsupportedUseError: An edit does something else than to change weights.
    """
    found: dict[str, WeightDelta] = {}
    for part in (part for edit in edits_in(edits) for part in edit.parts()):
        for effect in part.effects():
            if isinstance(effect, AddToOutput):
                known = found.get(effect.module)
                found[effect.module] = effect.delta if known is None else known.plus(effect.delta)
            elif not isinstance(effect, KeepMemory):
                raise UnsupportedUseError(
                    f"edit {part.id} by {part.origin.method or 'hand'} is of kind '{part.kind}', "
                    "which changes no weights, so that no adapter can hold it; keep it as a file "
                    "and apply it with this package"
                )
    return found


def truncated(change: WeightDelta, rank: int) -> tuple[LowRankDelta, float]:
    """The nearest product of a rank at most, in Frobenius' norm, and the share that it lacks.

    It is computed in float64: from the factors where there are no others, by their QR
    decompositions, else from the dense change ``[d_out, d_in]``.

    Args:
        change: The change, with a low-rank part, a dense one, or both.
        rank: The largest rank.
    """
    factors = change.only_low_rank
    if factors is not None and factors.rank <= rank:
        return factors, 0.0
    if factors is not None:
        left, upper = qr(factors.b.double())  # [d_out, k], [k, rank of the factors]
        right, lower = qr(factors.a.double().T)
        u, values, vh = svd(upper @ lower.T, full_matrices=False)
        u, vh, dtype = left @ u, vh @ right.T, factors.a.dtype
    else:
        matrix = change.matrix()
        assert matrix is not None
        dtype = matrix.dtype
        u, values, vh = svd(matrix.double(), full_matrices=False)
    kept = _kept(values, rank)
    root = values[:kept].sqrt()
    size = values.norm()
    lost = float(values[kept:].norm() / size) if size else 0.0
    a, b = (root[:, None] * vh[:kept]).to(dtype), (u[:, :kept] * root).to(dtype)
    return LowRankDelta(a.contiguous(), b.contiguous()), lost


def _kept(values: Tensor, rank: int) -> int:
    """The rank that is written: no more than there is beyond rounding, and at least one."""
    beyond = int((values > values.max() * torch.finfo(values.dtype).eps * len(values)).sum())
    return max(1, min(rank, beyond))


@torch.no_grad()
def truncate(base: EditableModel, edits: OneOrSeveral[Edit], rank: int) -> Truncation:
    """All edits as one whose changes have a rank at most; dense ones become products too.

    Args:
        base: The base model.
        edits: The edits, or one; they need not be applied.
        rank: The largest rank of a change.

    Raises:
        UnsupportedUseError: The rank is none, or an edit changes biases, or something else than
            weights, or none changes anything.
    """
    if rank < 1:
        raise UnsupportedUseError(f"the rank of an adapter must be 1 or more, got {rank}")
    changes = weight_changes(edits)
    _check_any(changes)
    biased = [name for name, change in changes.items() if change.bias is not None]
    if biased:
        raise UnsupportedUseError(
            f"the edits change the bias of {article_list(biased, 3)}, which no LoRA adapter "
            "holds; export the full model instead"
        )
    found = {name: truncated(change, rank) for name, change in changes.items()}
    factors = {name: (delta.a, delta.b) for name, (delta, _) in found.items()}
    return Truncation(LowRankEdit(base, factors), {n: lost for n, (_, lost) in found.items()})
