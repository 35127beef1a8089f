"""The networks of MEND and MALMEN: from the rank-one factors of a gradient to those of an edit.

Source: Mitchell et al. 2022, "Fast Model Editing at Scale", section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kedit_lightning.methods.capabilities import (
    Count,
    Finite,
    MethodSettings,
    NotNegative,
    Positive,
)
from kedit_lightning.methods.hypernetwork.shared.editor_network import ProjectionPlan
from kedit_lightning.methods.hypernetwork.shared.factor_statistics import RunningNormaliser
from kedit_lightning.methods.shared.gradient_factors import Factors
from kedit_lightning.methods.training.trained_network import TrainedNetwork


@dataclass(frozen=True)
class TransformPlan(ProjectionPlan):
    """Architecture of networks that transform gradients.

    Args:
        modules: Names of the edited projections, in order.
        rank: Largest rank of the residual blocks; at most their width.
        blocks: Residual blocks of each network.
        shared: One network for all projections of a shape, rather than one each.
        normalise: Standardise the factors with running statistics first.
    """

    #: Whether a block clamps before it scales and shifts, rather than after.
    clamps_first: ClassVar[bool] = False

    rank: int = 1920
    blocks: int = 2
    shared: bool = True
    normalise: bool = True


@dataclass(frozen=True)
class TransformSettings(MethodSettings):
    """The part of the settings that methods with such networks share."""

    lr: Positive
    rank: Count | None
    blocks: Count | None
    shared: bool | None
    normalise: bool
    lr_lr: NotNegative
    edit_lr: Finite
    c_edit: NotNegative
    c_loc: NotNegative

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The networks' learning rate, and that of the edits' own learning rates."""
        return self.lr, self.lr_lr


class ResidualBlock(nn.Module):
    """A low-rank residual block: ``z + max((z Vᵀ Uᵀ + bias) ⊙ scale + shift, 0)``.

    If it clamps first: ``z + max(z Vᵀ Uᵀ + bias, 0) ⊙ scale + shift``. ``U``, the bias and the
    shift start at 0, so an untrained block is the identity. Each of the ``members``, the
    projections that share the block, has its own scale and shift.
    """

    def __init__(
        self,
        width: int,
        members: int,
        plan: TransformPlan,
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
        """Transform ``z``, ``[tokens, width]``, of the projection numbered ``member``."""
        step = (z @ self.V.T) @ self.U.T + self.bias
        # A clamp passes the gradient at exactly 0, where all steps start; a relu would block it.
        if self.clamps_first:
            return z + step.clamp(min=0) * self.scale[member] + self.shift[member]
        return z + (step * self.scale[member] + self.shift[member]).clamp(min=0)


class GradientTransform(nn.Module):
    """Transforms the inputs and output gradients of ``members`` projections of one shape."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        members: int,
        plan: TransformPlan,
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
        """Transform ``[tokens, d_in]`` and ``[tokens, d_out]`` to factors of the same shapes."""
        z = torch.cat([inputs, gradients], -1)
        if self.normaliser is not None:
            z = self.normaliser(z)
        for block in self.blocks:
            z = block(z, member)
        new_inputs, new_gradients = z.split(self.split, -1)
        return new_inputs, new_gradients


class TransformNetwork(TrainedNetwork):
    """The networks of all edited projections, one each or one for all of a shape.

    Untrained networks are the identity on (normalised) factors.

    Args:
        plan: Their architecture.
        shapes: ``(d_in, d_out)`` of each projection of the plan.
        dtype: Number type of parameters and statistics.
        seed: Fixes the initial values.
    """

    plan: TransformPlan

    def __init__(
        self,
        plan: TransformPlan,
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
        """Transform ``[tokens, d_in]`` and ``[tokens, d_out]`` with a projection's network."""
        key, member = self._place[name]
        transformed: tuple[Tensor, Tensor] = self.networks[key](inputs, gradients, member)
        return transformed

    def update_statistics(self, factors: Sequence[Mapping[str, Factors]]) -> None:
        """Update the normalisers with the factors of a training step."""
        if not self.plan.normalise:
            return
        rows: dict[str, list[Tensor]] = {}
        for name in self.plan.modules:
            for inputs, gradients in ((f[name].inputs, f[name].gradients) for f in factors):
                contributes = (gradients != 0).any(-1)
                joined = torch.cat([inputs, gradients], -1)[contributes]
                rows.setdefault(self._place[name][0], []).append(joined)
        for key, parts in rows.items():
            normaliser = self.networks[key].normaliser
            assert isinstance(normaliser, RunningNormaliser)
            normaliser.update(torch.cat(parts))
