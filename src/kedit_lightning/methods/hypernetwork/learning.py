"""The gradient of a training step of a hypernetwork, over episodes, passes and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.methods.capture import Factors, capture_factors
from kedit_lightning.methods.episodes import Episode
from kedit_lightning.methods.hypernetwork.network import ProposingNetwork
from kedit_lightning.methods.hypernetwork.outcome import Outcome
from kedit_lightning.methods.hypernetwork.outer_loss import episode_losses, request_rows
from kedit_lightning.methods.losses import all_finite
from kedit_lightning.methods.ranks import on_some_rank


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
    groups = [episodes[i : i + size] for i in range(0, len(episodes), size)]
    captured = []
    for group in groups:
        rows, numbers = request_rows(base, group)
        captured.append((capture_factors(base, rows, network.plan.modules), numbers))
    network.observe([factors for factors, _ in captured])
    outcome, failed = Outcome.nothing(network), []
    for group, (factors, numbers) in zip(groups, captured, strict=True):
        tried = _try(base, network, group, factors, numbers, weights)
        failed.append(tried is None)
        outcome += tried or Outcome.nothing(network)
    # Ranks run the same passes, whichever of them has failed: those of a sharded model need them.
    again = on_some_rank(failed, network.updates.device)
    for group, own, mine, retry in zip(groups, captured, failed, again, strict=True):
        for tried in _singly(base, network, group, *own, weights) if retry else ():
            if mine:
                outcome += tried or Outcome.nothing(network, skipped=1)
    return outcome.over_ranks()


def _singly(
    base: BaseModel,
    network: ProposingNetwork,
    episodes: Sequence[Episode],
    factors: dict[str, Factors],
    edit_of_row: Tensor,
    weights: tuple[float, float],
) -> Iterator[Outcome | None]:
    """Try episodes one by one; a single one was tried already, and gives what it gave."""
    if len(episodes) == 1:
        yield None
        return
    for number, episode in enumerate(episodes):
        rows = (edit_of_row == number).nonzero()[:, 0]
        first, last = int(rows[0]), int(rows[-1]) + 1
        own = {name: part.of_rows(first, last) for name, part in factors.items()}
        yield _try(base, network, [episode], own, edit_of_row[rows] - number, weights)


def _try(
    base: BaseModel,
    network: ProposingNetwork,
    episodes: Sequence[Episode],
    factors: dict[str, Factors],
    edit_of_row: Tensor,
    weights: tuple[float, float],
) -> Outcome | None:
    """Try episodes together; ``None`` where that gives NaN or infinity."""
    with torch.enable_grad():
        requests = [request for episode in episodes for request in episode.requests]
        changes = network.propose(base, requests, factors, edit_of_row)
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
