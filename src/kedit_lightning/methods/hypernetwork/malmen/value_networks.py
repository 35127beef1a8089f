"""The networks of MALMEN: from the factors of a gradient to wanted changes of values.

Source: Tan et al. 2024, "Massive Editing for Large Language Models via Meta Learning", section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from kedit_lightning.methods.hypernetwork.malmen.key_covariance import KeyMoment
from kedit_lightning.methods.hypernetwork.shared.gradient_transform import (
    NetworkPlan,
    ProjectionNetworks,
)

#: Tokens of a request whose keys and gradients are read: those that predict its answer, or all.
Tokens: TypeAlias = Literal["answer", "all"]
#: What the ridge takes as the size of a shift: its squared norm, or its mean squared effect on the
#: keys that the fit has met.
ShiftSize: TypeAlias = Literal["norm", "keys"]


@dataclass(frozen=True)
class ValuePlan(NetworkPlan):
    """The networks of MALMEN.

    Args:
        tokens: The tokens of a request that give keys.
        shift_size: What the ridge takes as the size of a shift.
    """

    clamps_first: ClassVar[bool] = True

    tokens: Tokens = "answer"
    shift_size: ShiftSize = "norm"


class ValueNetworks(ProjectionNetworks):
    """Networks that say how the value of a key is to change, and how strong the ridge is.

    A key ``k`` with output gradient ``δ`` is mapped to ``k̃`` and ``δ̃``; its value is to change by
    ``−η (k · k̃) δ̃``.  Each projection has an ``η`` and a ridge ``λ`` of its own, learned as
    logarithms, so that no step turns their sign.

    Args:
        plan: What they are made of.
        shapes: ``(d_in, d_out)`` of each projection of the plan.
        edit_lr: Starting ``η``.
        ridge: Starting ``λ``.
        dtype: Number type of parameters and statistics.
        seed: Fixes the starting values.
    """

    plan: ValuePlan

    def __init__(
        self,
        plan: ValuePlan,
        shapes: Sequence[tuple[int, int]],
        edit_lr: float,
        ridge: float,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(plan, shapes, dtype, seed)
        self.shapes = dict(zip(plan.modules, shapes, strict=True))
        start = torch.ones(len(plan.modules), dtype=dtype)
        self.log_rates = nn.Parameter(start * math.log(edit_lr))
        self.log_ridges = nn.Parameter(start * math.log(ridge))
        by_keys = plan.shift_size == "keys"
        self.moments = nn.ModuleList(KeyMoment(d_in, dtype) for d_in, _ in shapes if by_keys)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Learning rates of the edits and ridges learn at a rate of their own."""
        scales = [self.log_rates, self.log_ridges]
        return {"lr": list(self.networks.parameters()), "lr_lr": scales}

    def scalars(self) -> dict[str, Tensor]:
        """Learning rate and ridge of each projection."""
        rates, ridges = self.log_rates.detach().exp(), self.log_ridges.detach().exp()
        named: dict[str, Tensor] = {}
        for name, rate, ridge in zip(self.plan.modules, rates, ridges, strict=True):
            named |= {f"edit_lr/{name}": rate, f"ridge/{name}": ridge}
        return named

    def ridge(self, name: str) -> Tensor:
        """``λ`` of a projection, a scalar."""
        return self.log_ridges[self.plan.modules.index(name)].exp()

    def meet(self, keys: Mapping[str, Tensor]) -> None:
        """Take keys, ``[n, d_in]`` by projection, into what the size of shifts is measured on."""
        for name, own in keys.items():
            self._moment(name).update(own)

    def metric(self, name: str) -> Tensor | None:
        """``M`` of the size ``tr(Sᵀ M S)`` of a projection's shift; ``None`` for its norm."""
        return self._moment(name).metric if self.plan.shift_size == "keys" else None

    def _moment(self, name: str) -> KeyMoment:
        moment = self.moments[self.plan.modules.index(name)]
        assert isinstance(moment, KeyMoment)
        return moment

    def values(self, name: str, keys: Tensor, gradients: Tensor) -> Tensor:
        """Wanted changes of values, ``[tokens, d_out]``.

        Args:
            name: The projection.
            keys: What it received. Shape ``[tokens, d_in]``.
            gradients: Gradients with respect to its outputs. Shape ``[tokens, d_out]``.
        """
        with torch.autocast(self.log_rates.device.type, enabled=False):
            keys, gradients = keys.to(self.log_rates), gradients.to(self.log_rates)
            mapped, direction = self.transform(name, keys, gradients)
            rate = self.log_rates[self.plan.modules.index(name)].exp()
            return -rate * (keys * mapped).sum(-1, keepdim=True) * direction
