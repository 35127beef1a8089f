"""Changes of experts in peft's format: one pair of factors for the parameter that holds them all.

peft adapts a parameter of ``[experts, rows, columns]`` by factors whose first holds experts one
after the other and whose second holds them side by side in each rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.experts import FlatExperts
from kedit_lightning.edits.low_rank import LowRankDelta
from kedit_lightning.edits.projections import find_module
from kedit_lightning.errors import UnsupportedUseError


@dataclass(frozen=True)
class FusedChange:
    """Changes of the experts that one parameter holds, by number."""

    projection: ExpertProjection
    deltas: Mapping[int, LowRankDelta]

    @property
    def rank(self) -> int:
        """The largest rank of an expert's change."""
        return max(delta.rank for delta in self.deltas.values())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``lora_A.weight`` and ``lora_B.weight``, filled up with zeros to a rank."""
        experts = self.projection.experts
        count, d_out, d_in = experts.matrices(experts.fused).shape
        d_left, d_right = (d_in, d_out) if experts.transposed else (d_out, d_in)
        like = next(iter(self.deltas.values())).a
        # ``Δ_e = left_e right_e`` in the orientation of the parameter.
        left, right = like.new_zeros(count, d_left, rank), like.new_zeros(count, rank, d_right)
        for expert, (a, b) in self.deltas.items():
            left[expert, :, : len(a)] = a.T if experts.transposed else b
            right[expert, : len(a)] = b.T if experts.transposed else a
        if getattr(experts.module, "is_transposed", False):  # peft takes its in-features first
            left, right = right.mT, left.mT
        return right.flatten(0, 1), left.permute(1, 2, 0).flatten(1)


def expert_changes(projection: ExpertProjection, a: Tensor, b: Tensor) -> dict[str, LowRankDelta]:
    """Changes of single experts by name, those that are zero left out.

    Args:
        projection: The projection of all experts.
        a: ``lora_A.weight`` of the parameter that holds them, ``[experts · rank, ...]``.
        b: Its ``lora_B.weight``, with the scale. Shape ``[..., rank · experts]``.
    """
    experts = projection.experts
    right = a.unflatten(0, (experts.count, -1))
    left = b.unflatten(1, (-1, experts.count)).permute(2, 0, 1)
    if getattr(experts.module, "is_transposed", False):  # peft takes its in-features first
        left, right = right.mT, left.mT
    if experts.transposed:
        left, right = right.mT, left.mT
    pairs = enumerate(zip(right, left, strict=True))
    return {
        projection.name_of(expert): LowRankDelta(down.contiguous(), up.contiguous())
        for expert, (down, up) in pairs
        if bool(down.any()) and bool(up.any())
    }


def check_adaptable(projection: ExpertProjection) -> None:
    """Make sure that peft's forward pass uses a change of the parameter that holds experts.

    Raises:
        UnsupportedUseError: It would leave it out.
    """
    if isinstance(projection.experts, FlatExperts):
        raise UnsupportedUseError(
            f"the experts in '{projection.fused_name}' are read by a module around the one that "
            "peft would adapt, so that its forward pass would leave the change out; export the "
            "full model instead, and train such experts with FTM"
        )


def fused_changes(model: nn.Module, deltas: Mapping[str, LowRankDelta]) -> dict[str, FusedChange]:
    """Those changes that are of experts, by name of the parameter that holds them.

    Raises:
        UnsupportedUseError: peft's forward pass would leave a change out.
    """
    found: dict[str, tuple[ExpertProjection, dict[int, LowRankDelta]]] = {}
    for name, delta in deltas.items():
        module = find_module(model, name)
        if isinstance(module, ExpertProjection) and module.expert is not None:
            check_adaptable(module)
            cpu = delta.to(torch.device("cpu"))
            found.setdefault(module.fused_name, (module, {}))[1][module.expert] = cpu
    return {name: FusedChange(*change) for name, change in found.items()}
