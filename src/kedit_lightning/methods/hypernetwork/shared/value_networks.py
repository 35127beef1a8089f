"""The networks of MALMEN: from the factors of a gradient to value differences.

Source: Tan et al. 2024, "Massive Editing for Large Language Models via Meta Learning", section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from kedit_lightning.methods.capabilities import Count, Positive
from kedit_lightning.methods.hypernetwork.shared.factor_statistics import KeyCovariance
from kedit_lightning.methods.hypernetwork.shared.gradient_transform import (
    TransformNetwork,
    TransformPlan,
    TransformSettings,
)
from kedit_lightning.methods.training.trained_method import TrainedSettings

#: Projections of an MLP: the one that writes into the residual stream, those that read it, or all.
Projections: TypeAlias = Literal["down", "up", "all"]
#: Tokens of a request that give keys and gradients: those that predict its answer, or all.
Tokens: TypeAlias = Literal["answer", "all"]
#: What the ridge penalises: the squared norm of a shift, or its mean squared effect on the keys of
#: the fit.
ShiftSize: TypeAlias = Literal["norm", "keys"]


@dataclass(frozen=True)
class MALMENMethodSettings(TransformSettings, TrainedSettings):
    """The part of the settings that MALMEN and RLEdit share."""

    at_once: Count
    edit_lr: Positive  # kept as a logarithm
    projections: Projections | None
    tokens: Tokens | None
    shift_size: ShiftSize | None
    ridge: Positive


@dataclass(frozen=True)
class ValuePlan(TransformPlan):
    """Architecture of MALMEN's networks.

    Args:
        tokens: The tokens of a request that give keys.
        shift_size: What the ridge penalises.
    """

    clamps_first: ClassVar[bool] = True

    tokens: Tokens = "answer"
    shift_size: ShiftSize = "norm"


class ValueNetworks(TransformNetwork):
    """Maps the factors of gradients to value differences, and holds the ridge of each projection.

    A key ``k`` with output gradient ``δ`` is transformed to ``k̃`` and ``δ̃``; its value difference
    is ``−η (k · k̃) δ̃``.  Each projection has its own learning rate ``η`` and ridge ``λ``, learned
    as logarithms, so that they stay positive; settings give their initial values.
    """

    plan: ValuePlan

    def __init__(
        self,
        plan: ValuePlan,
        shapes: Sequence[tuple[int, int]],
        settings: MALMENMethodSettings,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(plan, shapes, dtype, settings.start)
        self.shapes = dict(zip(plan.modules, shapes, strict=True))
        start = torch.ones(len(plan.modules), dtype=dtype)
        self.log_rates = nn.Parameter(start * math.log(settings.edit_lr))
        self.log_ridges = nn.Parameter(start * math.log(settings.ridge))
        by_keys = plan.shift_size == "keys"
        # Checkpoints hold the covariances by this name.
        self.moments = nn.ModuleList(KeyCovariance(d_in, dtype) for d_in, _ in shapes if by_keys)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The networks; the learning rates of the edits and the ridges."""
        return [list(self.networks.parameters()), [self.log_rates, self.log_ridges]]

    def scalars(self) -> dict[str, Tensor]:
        """Learning rate and ridge of each projection."""
        rates, ridges = self.log_rates.detach().exp(), self.log_ridges.detach().exp()
        scalars: dict[str, Tensor] = {}
        for name, rate, ridge in zip(self.plan.modules, rates, ridges, strict=True):
            scalars |= {f"edit_lr/{name}": rate, f"ridge/{name}": ridge}
        return scalars

    def ridge(self, name: str) -> Tensor:
        """``λ`` of a projection, a scalar."""
        return self.log_ridges[self.plan.modules.index(name)].exp()

    def update_key_covariances(self, keys: Mapping[str, Tensor]) -> None:
        """Update the key covariance of each projection with keys ``[n, d_in]``."""
        for name, rows in keys.items():
            self._key_covariance(name).update(rows)

    def metric(self, name: str) -> Tensor | None:
        """``M`` of the penalty ``λ tr(Sᵀ M S)`` of a projection's shift; ``None`` for its norm."""
        return self._key_covariance(name).metric if self.plan.shift_size == "keys" else None

    def _key_covariance(self, name: str) -> KeyCovariance:
        covariance = self.moments[self.plan.modules.index(name)]
        assert isinstance(covariance, KeyCovariance)
        return covariance

    def values(self, name: str, keys: Tensor, gradients: Tensor) -> Tensor:
        """Value differences ``[tokens, d_out]`` from the inputs and output gradients."""
        with torch.autocast(self.log_rates.device.type, enabled=False):
            keys, gradients = keys.to(self.log_rates), gradients.to(self.log_rates)
            transformed, direction = self.transform(name, keys, gradients)
            rate = self.log_rates[self.plan.modules.index(name)].exp()
            return -rate * (keys * transformed).sum(-1, keepdim=True) * direction
