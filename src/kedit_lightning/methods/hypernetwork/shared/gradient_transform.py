"""The networks of hypernetworks: from the factors of a gradient to those of an edit.

Source: Mitchell et al. 2022, "Fast Model Editing at Scale", section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kedit_lightning.base_models import BaseModel
from kedit_lightning.methods.hypernetwork.shared.attach import LowRankChange
from kedit_lightning.methods.hypernetwork.shared.network import ProjectionPlan, ProposingNetwork
from kedit_lightning.methods.hypernetwork.shared.normaliser import RunningNormaliser
from kedit_lightning.methods.shared.gradient_factors import Factors
from kedit_lightning.methods.training.learned import LearnedNetwork
from kedit_lightning.requests import EditRequest

#: Largest rank of a network's matrices, unless a setting says otherwise.
MAX_RANK = 1920


@dataclass(frozen=True)
class NetworkPlan(ProjectionPlan):
    """The networks of a method.

    Args:
        modules: The projections it edits, in order.
        rank: Rank of its matrices, at most the width of what they act on.
        blocks: Residual blocks a network.
        shared: One network for all projections of a shape, rather than one each.
        normalise: Normalise the factors first.
    """

    #: Whether a block's step is clamped before it is scaled and shifted, rather than after.
    clamps_first: ClassVar[bool] = False

    rank: int = MAX_RANK
    blocks: int = 2
    shared: bool = True
    normalise: bool = True


@dataclass(frozen=True)
class TransformPlan(NetworkPlan):
    """The networks of MEND.

    Args:
        ascend: Add the pseudo-gradient, as the released code does, instead of subtracting it.
    """

    ascend: bool = False


class ResidualBlock(nn.Module):
    """Adds ``max((z Vᵀ Uᵀ + bias) ⊙ scale + shift, 0)``, which is zero to begin with.

    Clamped first it adds ``max(z Vᵀ Uᵀ + bias, 0) ⊙ scale + shift``.

    Args:
        width: Values a row.
        members: Projections that share the block; each has a scale and a shift of its own.
        plan: Rank of the map, and when it is clamped.
        generator: Where the starting values come from.
        dtype: Number type of the parameters.
    """

    def __init__(
        self,
        width: int,
        members: int,
        plan: NetworkPlan,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        rank = min(plan.rank, width)
        self.clamps_first = plan.clamps_first
        self.V = nn.Parameter(torch.randn(rank, width, generator=generator, dtype=dtype))
        self.U = nn.Parameter(torch.zeros(width, rank, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.scale = nn.Parameter(torch.ones(members, width, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(members, width, dtype=dtype))

    def forward(self, z: Tensor, member: int) -> Tensor:
        """Map rows ``[tokens, width]`` of one of the projections."""
        step = (z @ self.V.T) @ self.U.T + self.bias
        # A clamp passes the gradient at exactly 0, where all steps start; a relu would block it.
        if self.clamps_first:
            return z + step.clamp(min=0) * self.scale[member] + self.shift[member]
        return z + (step * self.scale[member] + self.shift[member]).clamp(min=0)


class GradientTransform(nn.Module):
    """One network: maps inputs and output gradients of the projections that share it.

    Args:
        d_in: Width of the inputs.
        d_out: Width of the output gradients.
        members: Number of projections that share the network.
        plan: Rank, number of blocks, normalisation.
        generator: Where the starting values come from.
        dtype: Number type of parameters and statistics.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        members: int,
        plan: NetworkPlan,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        width = d_in + d_out
        self.split = [d_in, d_out]
        self.normaliser = RunningNormaliser(width, dtype) if plan.normalise else None
        self.blocks = nn.ModuleList(
            ResidualBlock(width, members, plan, generator, dtype) for _ in range(plan.blocks)
        )

    def forward(self, inputs: Tensor, gradients: Tensor, member: int) -> tuple[Tensor, Tensor]:
        """Map ``[tokens, d_in]`` and ``[tokens, d_out]`` to pseudo-factors of the same shapes."""
        z = torch.cat([inputs, gradients], -1)
        if self.normaliser is not None:
            z = self.normaliser(z)
        for block in self.blocks:
            z = block(z, member)
        mapped, mapped_gradients = z.split(self.split, -1)
        return mapped, mapped_gradients


class ProjectionNetworks(LearnedNetwork):
    """The networks of all edited projections, one each or one for all of a shape.

    Before any training every network is the identity on (normalised) factors.

    Args:
        plan: What they are made of.
        shapes: ``(d_in, d_out)`` of each projection of the plan.
        dtype: Number type of parameters and statistics.
        seed: Fixes the starting values.
    """

    plan: NetworkPlan

    def __init__(
        self,
        plan: NetworkPlan,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(plan)
        keys = [
            f"{d_in}x{d_out}" if plan.shared else str(number)
            for number, (d_in, d_out) in enumerate(shapes)
        ]
        self._place = {
            name: (key, keys[:number].count(key))
            for number, (name, key) in enumerate(zip(plan.modules, keys, strict=True))
        }
        generator = torch.Generator().manual_seed(seed)
        self.networks = nn.ModuleDict(
            {
                key: GradientTransform(*shape, keys.count(key), plan, generator, dtype)
                for key, shape in dict(zip(keys, shapes, strict=True)).items()
            }
        )

    def transform(self, name: str, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Map factors ``[tokens, d_in]`` and ``[tokens, d_out]`` by a projection's network."""
        key, member = self._place[name]
        mapped: tuple[Tensor, Tensor] = self.networks[key](inputs, gradients, member)
        return mapped

    def observe(self, captured: Sequence[Mapping[str, Factors]]) -> None:
        """Take factors into the statistics of the normalisers; only training does that."""
        if not self.plan.normalise:
            return
        rows: dict[str, list[Tensor]] = {}
        for name in self.plan.modules:
            for own in (factors[name] for factors in captured):
                seen = (own.gradients != 0).any(-1)
                joined = torch.cat([own.inputs, own.gradients], -1)[seen]
                rows.setdefault(self._place[name][0], []).append(joined)
        for key, parts in rows.items():
            normaliser = self.networks[key].normaliser
            assert isinstance(normaliser, RunningNormaliser)
            normaliser.update(torch.cat(parts))


class Hypernetwork(ProjectionNetworks, ProposingNetwork):
    """MEND's networks, with a learning rate for each projection.

    Args:
        plan: What they are made of.
        shapes: ``(d_in, d_out)`` of each projection of the plan.
        edit_lr: Starting learning rate of the edits.
        dtype: Number type of parameters and statistics.
        seed: Fixes the starting values.
    """

    plan: TransformPlan

    def __init__(
        self,
        plan: TransformPlan,
        shapes: Sequence[tuple[int, int]],
        edit_lr: float,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(plan, shapes, dtype, seed)
        self.rates = nn.Parameter(torch.full((len(plan.modules),), edit_lr, dtype=dtype))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The learning rates of the edits learn at a rate of their own."""
        return {"lr": list(self.networks.parameters()), "lr_lr": [self.rates]}

    def scalars(self) -> dict[str, Tensor]:
        """The learning rate of each projection."""
        rates = self.rates.detach()
        names = (f"edit_lr/{name}" for name in self.plan.modules)
        return dict(zip(names, rates, strict=True))

    def propose(
        self,
        base: BaseModel,
        requests: Sequence[EditRequest],
        factors: Mapping[str, Factors],
        edit_of_row: Tensor,
    ) -> dict[str, LowRankChange]:
        """Turn the factors of requests into changes of the projections; see the base class."""
        changes: dict[str, LowRankChange] = self(factors, edit_of_row)
        return changes

    def forward(
        self, factors: Mapping[str, Factors], edit_of_row: Tensor
    ) -> dict[str, LowRankChange]:
        """Turn factors into changes.

        Args:
            factors: Factors by projection.
            edit_of_row: Number of the edit that each row goes into. Shape ``[rows]``.
        """
        changes = {}
        with torch.autocast(self.rates.device.type, enabled=False):
            for number, name in enumerate(self.plan.modules):
                own = factors[name]
                inputs, gradients = (x.to(self.rates) for x in (own.inputs, own.gradients))
                a, b = self.transform(name, inputs, gradients)
                rate = self.rates[number] if self.plan.ascend else -self.rates[number]
                edits = edit_of_row.to(own.rows.device)[own.rows]
                changes[name] = LowRankChange(a, rate * b, edits)
        return changes
