"""The meta-gradient of a training step: the gradient of the outer loss in the hypernetwork."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kedit_lightning.base_models import BaseModel
from kedit_lightning.methods.hypernetwork.shared.editor_network import EditorNetwork
from kedit_lightning.methods.hypernetwork.shared.outer_loss import outer_losses, request_rows
from kedit_lightning.methods.shared.gradient_factors import Factors, capture_factors
from kedit_lightning.methods.shared.losses import all_finite
from kedit_lightning.methods.training.distributed import (
    any_over_ranks,
    several_ranks,
    sum_over_ranks,
)
from kedit_lightning.methods.training.episodes import Episode


@dataclass(frozen=True)
class MetaGradient:
    """Gradients and losses, summed over the episodes whose gradient is finite.

    Args:
        gradients: Sum of the gradients, one tensor a parameter.
        sums: Sums of loss, edit loss, locality loss and edit success. Shape ``[4]``.
        episodes: Number of episodes summed.
        skipped: Number of episodes left out.
    """

    gradients: list[Tensor]
    sums: Tensor
    episodes: int
    skipped: int

    @classmethod
    def zero(cls, network: nn.Module, skipped: int = 0) -> MetaGradient:
        """The sum over no episodes."""
        zeros = [torch.zeros_like(parameter) for parameter in network.parameters()]
        return cls(zeros, zeros[0].new_zeros(4), 0, skipped)

    def __add__(self, other: MetaGradient) -> MetaGradient:
        return MetaGradient(
            [a + b for a, b in zip(self.gradients, other.gradients, strict=True)],
            self.sums + other.sums,
            self.episodes + other.episodes,
            self.skipped + other.skipped,
        )

    @property
    def mean_gradients(self) -> list[Tensor]:
        """Gradient of the mean loss of an episode, one tensor a parameter."""
        return [gradient / self.episodes for gradient in self.gradients]

    @property
    def loss(self) -> Tensor:
        """Mean loss of an episode. Shape ``[]``."""
        return self.sums[0] / self.episodes

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Edit loss, locality loss and edit success, to be logged beside the loss."""
        names = ("loss_edit", "loss_locality", "edit_success")
        return {name: part / self.episodes for name, part in zip(names, self.sums[1:], strict=True)}

    def over_ranks(self) -> MetaGradient:
        """The sum over all ranks."""
        if not several_ranks():
            return self
        counts = torch.tensor([self.episodes, self.skipped], device=self.sums.device)
        sum_over_ranks((*self.gradients, self.sums, counts))
        episodes, skipped = counts.tolist()
        return MetaGradient(self.gradients, self.sums, episodes, skipped)


@dataclass(frozen=True)
class _Minibatch:
    """Episodes that run together, their factors, and the episode of each request, ``[rows]``."""

    episodes: Sequence[Episode]
    factors: dict[str, Factors]
    edit_of_row: Tensor

    def singles(self) -> Iterator[_Minibatch]:
        """A minibatch of each episode; the minibatch itself where it has one episode."""
        if len(self.episodes) == 1:
            yield self
            return
        for number, episode in enumerate(self.episodes):
            rows = (self.edit_of_row == number).nonzero()[:, 0]
            first, last = int(rows[0]), int(rows[-1]) + 1
            factors = {name: part.of_rows(first, last) for name, part in self.factors.items()}
            yield _Minibatch([episode], factors, self.edit_of_row[rows] - number)


def meta_gradient(
    base: BaseModel,
    network: EditorNetwork,
    episodes: Sequence[Episode],
    weights: tuple[float, float],
    at_once: int | None = None,
) -> MetaGradient:
    """Meta-gradient of episodes, summed over the ranks of a distributed run.

    The statistics of the network are updated with all episodes before the first delta is computed,
    so the result does not depend on ``at_once`` or on the distribution of episodes over ranks.

    Args:
        base: The base model, with the edits on its stack in force.
        network: The hypernetwork; only its statistics change.
        episodes: The episodes of this rank.
        weights: Weights of the edit loss and of the locality loss.
        at_once: Episodes of a minibatch; all of them if absent.
    """
    size = at_once or len(episodes)
    minibatches = []
    for group in (episodes[i : i + size] for i in range(0, len(episodes), size)):
        rows, edit_of_row = request_rows(base, group)
        factors = capture_factors(base, rows, network.plan.modules)
        minibatches.append(_Minibatch(group, factors, edit_of_row))
    network.update_statistics([minibatch.factors for minibatch in minibatches])
    total, failed = MetaGradient.zero(network), []
    for minibatch in minibatches:
        gradient = _gradient(base, network, minibatch, weights)
        failed.append(gradient is None)
        total += gradient or MetaGradient.zero(network)
    # All ranks repeat the passes of a failed minibatch: those of a sharded model need each other.
    repeated = any_over_ranks(failed, network.updates.device)
    for minibatch, failed_here, repeat in zip(minibatches, failed, repeated, strict=True):
        for single in minibatch.singles() if repeat else ():
            # A minibatch of one episode is not run again, as it would give the same.
            gradient = None if single is minibatch else _gradient(base, network, single, weights)
            if failed_here:
                total += gradient or MetaGradient.zero(network, skipped=1)
    return total.over_ranks()


def _gradient(
    base: BaseModel, network: EditorNetwork, minibatch: _Minibatch, weights: tuple[float, float]
) -> MetaGradient | None:
    """Meta-gradient of a minibatch; ``None`` where it holds NaN or infinity."""
    episodes = minibatch.episodes
    with torch.enable_grad():
        requests = [request for episode in episodes for request in episode.requests]
        deltas = network.deltas(base, requests, minibatch.factors, minibatch.edit_of_row)
        losses = outer_losses(base, episodes, *deltas)
        loss = weights[0] * losses.edit + weights[1] * losses.locality
        # The gradient of the network alone: no ``.grad`` is set on any tensor, so DDP has nothing
        # to reduce a second time.
        gradients = torch.autograd.grad(loss.sum(), list(network.parameters()))
    if not all_finite((loss, *gradients)):
        return None
    parts = (loss, losses.edit, losses.locality, losses.success)
    sums = torch.stack([part.detach().sum().to(gradients[0]) for part in parts])
    return MetaGradient(list(gradients), sums, len(episodes), 0)
