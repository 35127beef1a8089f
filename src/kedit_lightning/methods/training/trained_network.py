"""Networks that ``fit`` trains, the plan that checkpoints hold of them, and their gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from kedit_lightning.edits.state_schema import check_value
from kedit_lightning.errors import CheckpointError, EditFileError


@dataclass(frozen=True)
class Plan:
    """Hyperparameters that fix the architecture of networks; checkpoints hold them.

    An entry that follows a setting has the setting's name.
    """

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_json`.

        Raises:
            CheckpointError: An entry is absent, unknown, or of another type.
        """
        try:
            check_value("its plan", dict(values), cls)
        except EditFileError as error:
            raise CheckpointError(
                f"the checkpoint of {cls.__name__.removesuffix('Plan')} is damaged: {error}; take "
                "it from a copy, or fit again"
            ) from error
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class FullPrecision(nn.Module):
    """A module whose tensors move between devices but keep their number types.

    Precision plugins turn a module's parameters and buffers into 16 bit, where a counter stops at
    256 and small steps of an optimizer vanish.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.detach().new_empty(0)).device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]


class TrainedNetwork(FullPrecision):
    """Networks with an architecture, their plan, and counters of their training."""

    updates: Tensor
    skipped: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        #: Optimizer steps so far; 0 for untrained networks.
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        #: Training episodes left out because their gradient was not finite.
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Parameters of the optimizer's groups; each group has a learning rate of its own."""
        return [list(self.parameters())]

    def scalars(self) -> dict[str, Tensor]:
        """Scalars to log at each training step, by name."""
        return {}


class BatchGradient(Protocol):
    """Loss and gradient of a training batch, over the episodes of all ranks."""

    @property
    def episodes(self) -> int:
        """Number of episodes with a finite gradient; for 0 the rest is undefined."""

    @property
    def skipped(self) -> int:
        """Number of episodes left out because their gradient was not finite."""

    @property
    def loss(self) -> Tensor:
        """Mean loss. Shape ``[]``."""

    @property
    def mean_gradients(self) -> list[Tensor]:
        """Gradient of the mean loss, one tensor a parameter."""

    @property
    def scalars(self) -> Mapping[str, Tensor]:
        """Scalars to log beside the loss, by name."""
