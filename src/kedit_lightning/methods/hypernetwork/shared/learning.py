"""The gradient of a training step of a hypernetwork, over episodes, passes and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.methods.hypernetwork.shared.network import ProposingNetwork
from kedit_lightning.methods.hypernetwork.shared.outcome import Outcome
from kedit_lightning.methods.hypernetwork.shared.outer_loss import episode_losses, request_rows
from kedit_lightning.methods.shared.gradient_factors import Factors, capture_factors
from kedit_lightning.methods.shared.losses import all_finite
from kedit_lightning.methods.training.distributed import on_some_rank
from kedit_lightning.methods.training.episodes import Episode


def learn(
    base: BaseModel,
    network: ProposingNetwork,
    episodes: Sequence[Episode],
    weights: tuple[float, float],
    at_once: int | None = None,
) -> Outcome:
    """Losses and gradients of episodes, with those of the other ranks where there are several.

    The statistics of the network's normalisers take in all episodes before any of them is tried,
    so the result does not depend on ``at_once`` or on how episodes are shared out over ranks.

    Args:
        base: The base model.
        network: The network that proposes edits; only its statistics change.
        episodes: The episodes of this rank.
        weights: Weights of the edit loss and of the locality loss.
        at_once: Episodes that run through the model together; all of them if absent.
    """
    size = at_once or len(episodes)
    trials = []
    for group in (episodes[i : i + size] for i in range(0, len(episodes), size)):
        rows, numbers = request_rows(base, group)
        trials.append(_Trial(group, capture_factors(base, rows, network.plan.modules), numbers))
    network.observe([trial.factors for trial in trials])
    outcome, failed = Outcome.nothing(network), []
    for trial in trials:
        tried = _try(base, network, trial, weights)
        failed.append(tried is None)
        outcome += tried or Outcome.nothing(network)
    # Ranks run the same passes, whichever of them has failed: those of a sharded model need them.
    again = on_some_rank(failed, network.updates.device)
    for trial, mine, retry in zip(trials, failed, again, strict=True):
        for single in trial.singles() if retry else ():
            # A single episode was tried already, and gives what it gave.
            tried = None if single is trial else _try(base, network, single, weights)
            if mine:
                outcome += tried or Outcome.nothing(network, skipped=1)
    return outcome.over_ranks()


@dataclass(frozen=True)
class _Trial:
    """Episodes that are tried together.

    Args:
        episodes: The episodes.
        factors: Factors of their requests, by projection.
        edit_of_row: Number of the episode that each request belongs to. Shape ``[rows]``.
    """

    episodes: Sequence[Episode]
    factors: dict[str, Factors]
    edit_of_row: Tensor

    def singles(self) -> Iterator[_Trial]:
        """Each episode by itself; the trial itself where there is one alone."""
        if len(self.episodes) == 1:
            yield self
            return
        for number, episode in enumerate(self.episodes):
            rows = (self.edit_of_row == number).nonzero()[:, 0]
            first, last = int(rows[0]), int(rows[-1]) + 1
            own = {name: part.of_rows(first, last) for name, part in self.factors.items()}
            yield _Trial([episode], own, self.edit_of_row[rows] - number)


def _try(
    base: BaseModel, network: ProposingNetwork, trial: _Trial, weights: tuple[float, float]
) -> Outcome | None:
    """Try episodes together; ``None`` where that gives NaN or infinity."""
    episodes = trial.episodes
    with torch.enable_grad():
        requests = [request for episode in episodes for request in episode.requests]
        changes = network.propose(base, requests, trial.factors, trial.edit_of_row)
        losses = episode_losses(base, episodes, changes)
        loss = weights[0] * losses.edit + weights[1] * losses.locality
        # The backward pass of the network alone: no gradient is left on any tensor, and wrappers
        # for several processes see nothing that they would reduce a second time.
        gradients = torch.autograd.grad(loss.sum(), list(network.parameters()))
    if not all_finite((loss, *gradients)):
        return None
    parts = (loss, losses.edit, losses.locality, losses.right)
    sums = torch.stack([part.detach().sum().to(gradients[0]) for part in parts])
    return Outcome(list(gradients), sums, len(episodes), 0)
