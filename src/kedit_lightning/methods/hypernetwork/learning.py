"""The gradient of a training step of a hypernetwork, over episodes, passes and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from kedit_lightning.base_models import BaseModel
from kedit_lightning.methods.capture import Factors, capture_factors
from kedit_lightning.methods.hypernetwork.episodes import Episode, episode_losses, request_rows
from kedit_lightning.methods.hypernetwork.transform import Hypernetwork


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


def learn(
    base: BaseModel,
    network: Hypernetwork,
    episodes: Sequence[Episode],
    weights: tuple[float, float],
    at_once: int | None = None,
) -> Outcome:
    """Losses and gradients of episodes, with those of the other ranks where there are several.

    The statistics of the network's normalisers take in all episodes before any of them is tried,
    so the result does not depend on ``at_once`` or on how episodes are shared out over ranks.

    Args:
        base: The base model.
        network: The hypernetwork; only its statistics change.
        episodes: The episodes of this rank.
        weights: Weights of the edit loss and of the locality loss.
        at_once: Episodes that run through the model together; all of them if absent.
    """
    size = at_once or len(episodes)
    groups = [episodes[i : i + size] for i in range(0, len(episodes), size)]
    captured = []
    for group in groups:
        rows, numbers = request_rows(base, group)
        captured.append((capture_factors(base, rows, network.plan.modules), numbers))
    network.observe([factors for factors, _ in captured])
    outcome = _nothing(network)
    for group, (factors, numbers) in zip(groups, captured, strict=True):
        outcome += _try(base, network, group, factors, numbers, weights)
    return _over_ranks(outcome)


def _try(
    base: BaseModel,
    network: Hypernetwork,
    episodes: Sequence[Episode],
    factors: dict[str, Factors],
    edit_of_row: Tensor,
    weights: tuple[float, float],
) -> Outcome:
    """Try episodes together; where that gives NaN or infinity, one by one."""
    with torch.enable_grad():
        losses = episode_losses(base, episodes, network(factors, edit_of_row))
        loss = weights[0] * losses.edit + weights[1] * losses.locality
        # The backward pass of the network alone: no gradient is left on any tensor, and wrappers
        # for several processes see nothing that they would reduce a second time.
        gradients = torch.autograd.grad(loss.sum(), list(network.parameters()))
    if all(bool(torch.isfinite(tensor).all()) for tensor in (loss, *gradients)):
        parts = (loss, losses.edit, losses.locality, losses.right)
        sums = torch.stack([part.detach().sum().to(network.rates) for part in parts])
        return Outcome(list(gradients), sums, len(episodes), 0)
    if len(episodes) == 1:
        nothing = _nothing(network)
        return Outcome(nothing.gradients, nothing.sums, 0, 1)
    outcome = _nothing(network)
    for number, episode in enumerate(episodes):
        rows = (edit_of_row == number).nonzero()[:, 0]
        first, last = int(rows[0]), int(rows[-1]) + 1
        own = {name: part.of_rows(first, last) for name, part in factors.items()}
        outcome += _try(base, network, [episode], own, edit_of_row[rows] - number, weights)
    return outcome


def _nothing(network: Hypernetwork) -> Outcome:
    zeros = [torch.zeros_like(parameter) for parameter in network.parameters()]
    return Outcome(zeros, network.rates.new_zeros(4), 0, 0)


def _over_ranks(outcome: Outcome) -> Outcome:
    if not (distributed.is_available() and distributed.is_initialized()):
        return outcome
    counts = torch.tensor([outcome.episodes, outcome.skipped], device=outcome.sums.device)
    for tensor in (*outcome.gradients, outcome.sums, counts):
        distributed.all_reduce(tensor)
    episodes, skipped = counts.tolist()
    return Outcome(outcome.gradients, outcome.sums, episodes, skipped)
