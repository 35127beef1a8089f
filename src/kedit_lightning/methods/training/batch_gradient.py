"""The interface between the gradient of a training batch and the optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


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
