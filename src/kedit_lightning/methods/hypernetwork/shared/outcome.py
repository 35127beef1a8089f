"""What a training step of a hypernetwork gives: a gradient and losses, summed over episodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kedit_lightning.methods.training.distributed import several_ranks, sum_over_ranks


@dataclass(frozen=True)
class Outcome:
    """Sums over the episodes that gave a finite gradient.

    Args:
        gradients: Sum of the gradients, one tensor a parameter.
        sums: Loss, edit loss, locality loss and share of right answers, summed. Shape ``[4]``.
        episodes: Number of episodes summed.
        skipped: Number of episodes left out.
    """

    gradients: list[Tensor]
    sums: Tensor
    episodes: int
    skipped: int

    @classmethod
    def nothing(cls, network: nn.Module, skipped: int = 0) -> Outcome:
        """No episode that counts."""
        zeros = [torch.zeros_like(parameter) for parameter in network.parameters()]
        return cls(zeros, zeros[0].new_zeros(4), 0, skipped)

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            [a + b for a, b in zip(self.gradients, other.gradients, strict=True)],
            self.sums + other.sums,
            self.episodes + other.episodes,
            self.skipped + other.skipped,
        )

    @property
    def mean_gradients(self) -> list[Tensor]:
        """Gradient of the mean loss of an episode."""
        return [gradient / self.episodes for gradient in self.gradients]

    @property
    def loss(self) -> Tensor:
        """Mean loss of an episode."""
        return self.sums[0] / self.episodes

    @property
    def edit(self) -> Tensor:
        """Mean loss of the new answers, without its weight."""
        return self.sums[1] / self.episodes

    @property
    def locality(self) -> Tensor:
        """Mean divergence on unrelated questions, without its weight."""
        return self.sums[2] / self.episodes

    @property
    def right(self) -> Tensor:
        """Share of questions that are answered as the edit asks."""
        return self.sums[3] / self.episodes

    @property
    def scalars(self) -> dict[str, Tensor]:
        """What is logged beside the loss."""
        return {
            "loss_edit": self.edit,
            "loss_locality": self.locality,
            "edit_success": self.right,
        }

    def over_ranks(self) -> Outcome:
        """The sum over the ranks, where there are several."""
        if not several_ranks():
            return self
        counts = torch.tensor([self.episodes, self.skipped], device=self.sums.device)
        sum_over_ranks((*self.gradients, self.sums, counts))
        episodes, skipped = counts.tolist()
        return Outcome(self.gradients, self.sums, episodes, skipped)
