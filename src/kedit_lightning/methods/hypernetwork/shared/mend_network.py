"""The networks of MEND, and the base of the methods that train them.

Source: Mitchell et al. 2022, "Fast Model Editing at Scale", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import LowRankDelta
from kedit_lightning.methods.capabilities import Count
from kedit_lightning.methods.hypernetwork.shared.editor_network import BatchedDeltas, EditorNetwork
from kedit_lightning.methods.hypernetwork.shared.gradient_transform import (
    TransformNetwork,
    TransformPlan,
    TransformSettings,
)
from kedit_lightning.methods.method import Capabilities
from kedit_lightning.methods.shared.gradient_factors import Factors
from kedit_lightning.methods.training.trained_method import TrainedMethod, TrainedSettings
from kedit_lightning.requests import EditRequest

#: The default template of an instruction.
TEMPLATE = "Task: {task} Description: {description} Input: {prompt}"


@dataclass(frozen=True)
class MENDPlan(TransformPlan):
    """Architecture of MEND's networks.

    Args:
        ascend: Add the pseudo-gradient, as the released code does, instead of subtracting it.
        condition: Text before the prompt of a request, which earlier checkpoints have none of.
    """

    ascend: bool = False
    condition: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_json`; see the base class."""
        return super().from_json({"condition": None, **values})


@dataclass(frozen=True)
class InstructEditPlan(TransformPlan):
    """Architecture of the networks of InstructEdit, MEND's, and the template they were fitted with.

    Args:
        ascend: As in :class:`MENDPlan`.
        template: The template of instructions.
    """

    ascend: bool = False
    template: str = TEMPLATE


class MENDNetwork(TransformNetwork, EditorNetwork):
    """Maps the factors of gradients to low-rank deltas, the pseudo-gradients of an edit.

    The initial learning rate of the edits is a setting; ``shapes`` are ``(d_in, d_out)``.
    """

    plan: MENDPlan | InstructEditPlan

    def __init__(
        self,
        plan: MENDPlan | InstructEditPlan,
        shapes: Sequence[tuple[int, int]],
        settings: TransformSettings,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(plan, shapes, dtype, settings.start)
        rates = torch.full((len(plan.modules),), settings.edit_lr, dtype=dtype)
        self.rates = nn.Parameter(rates)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The networks, and the learning rates of the edits."""
        return [list(self.networks.parameters()), [self.rates]]

    def scalars(self) -> dict[str, Tensor]:
        """The learning rate of each projection."""
        names = (f"edit_lr/{name}" for name in self.plan.modules)
        return dict(zip(names, self.rates.detach(), strict=True))

    def deltas(
        self,
        base: BaseModel,
        requests: Sequence[EditRequest],
        factors: Mapping[str, Factors],
        edit_of_row: Tensor,
    ) -> BatchedDeltas:
        """Deltas with a rank-one term for each token; see the base class."""
        deltas, edit_of_term = {}, {}
        with torch.autocast(self.rates.device.type, enabled=False):
            for number, name in enumerate(self.plan.modules):
                part = factors[name]
                inputs, gradients = (x.to(self.rates) for x in (part.inputs, part.gradients))
                a, b = self.transform(name, inputs, gradients)
                rate = self.rates[number] if self.plan.ascend else -self.rates[number]
                deltas[name] = LowRankDelta(a, (rate * b).T)
                edit_of_term[name] = edit_of_row.to(part.rows.device)[part.rows]
        return deltas, edit_of_term


@dataclass(frozen=True)
class MENDMethodSettings(TransformSettings, TrainedSettings):
    """The part of the settings that MEND and InstructEdit share."""

    blocks: Count
    accumulate: Count
    legacy_sign: bool


class MENDMethod(TrainedMethod):
    """What MEND and InstructEdit share; both also derive from ``HypernetworkMethod``.

    Args:
        base_model: The model to edit.
        rank: Largest rank of a network's matrices. The checkpoint's, or else 1920.
        blocks: Residual blocks of a network.
        shared: One network for all projections of a shape, rather than one for each projection.
            The checkpoint's, or else true.
        normalise: Normalise the factors with running statistics. Without it, untrained networks
            give a plain step of gradient descent.
        lr: Learning rate of the networks.
        lr_lr: Learning rate of the edits' own learning rates.
        edit_lr: Initial learning rate of the edits.
        c_edit: Weight of the edit loss, the negative log-likelihood of the new answers.
        c_loc: Weight of the locality loss, the divergence on locality probes.
        accumulate: Episodes of a training step.
        legacy_sign: Add the pseudo-gradient as the released code does, so that a positive learning
            rate raises the loss until training has turned its sign.
        **settings: The settings of ``HypernetworkMethod``.
    """

    can: ClassVar[Capabilities] = Capabilities(
        encoder_decoder=True, adapter=True, weights=True, images=True
    )
    network_type = MENDNetwork

    settings: MENDMethodSettings
    network: MENDNetwork

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        rank: int | None = None,
        blocks: int = 2,
        shared: bool | None = None,
        normalise: bool = True,
        lr: float = 1e-6,
        lr_lr: float = 1e-4,
        edit_lr: float = 1e-4,
        c_edit: float = 0.1,
        c_loc: float = 1.0,
        accumulate: int = 10,
        legacy_sign: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, lr=lr, **settings)
        self.fit_batch_size *= accumulate

    def plan(self, saved: Any = None) -> Any:
        """The architecture that the settings ask for; see the base class."""
        return replace(super().plan(saved), ascend=self.settings.legacy_sign)

    @property
    def loss_weights(self) -> tuple[float, float]:
        """Weights of the edit loss and of the locality loss."""
        return self.settings.c_edit, self.settings.c_loc
