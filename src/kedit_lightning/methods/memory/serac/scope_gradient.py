"""The gradient of a training step of SERAC, over ranks, without what is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits.kinds.scope.scope_networks import ScopeNetworks
from kedit_lightning.methods.memory.serac.scope_losses import Tally, loss_weights, tally
from kedit_lightning.methods.shared.losses import all_finite
from kedit_lightning.methods.training.distributed import gather_over_ranks, sum_over_ranks
from kedit_lightning.requests import EditExample


@dataclass(frozen=True)
class ScopeOutcome:
    """What a batch of all ranks gives.

    Args:
        mean_gradients: Gradient of the loss, one tensor a parameter.
        weights: Weights of the sums in the loss. Shape ``[4]``.
        tally: The sums, without history.
        episodes: Number of examples that count.
        skipped: Number of examples left out.
    """

    mean_gradients: list[Tensor]
    weights: Tensor
    tally: Tally
    episodes: int
    skipped: int

    @property
    def loss(self) -> Tensor:
        """The loss."""
        return (self.weights * self.tally.losses).sum()

    @property
    def is_finite(self) -> bool:
        """Whether a step would leave the networks finite."""
        return all_finite((self.loss, *self.mean_gradients))

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Both losses without their weights, and how often the networks are right."""
        losses, noted, counts = self.tally.losses, self.tally.noted, self.tally.counts
        scope = loss_weights(counts, 0.0, 1.0).to(losses)
        return {
            "loss_edit": losses[3] / counts[3],
            "loss_scope": (scope * losses).sum(),
            "edit_success": noted[3] / counts[3],
            "scope_hits": noted[0] / counts[0],
            "scope_false_alarms": noted[1:3].sum() / counts[1:3].sum().clamp(min=1),
        }


def learn(
    base: BaseModel,
    networks: ScopeNetworks,
    examples: Sequence[EditExample],
    weights: tuple[float, float],
) -> ScopeOutcome:
    """Losses and gradient of the examples of all ranks; every rank takes part in each call.

    Where the gradient is not finite, examples whose own is not are left out; where it still is
    not, all are.

    Args:
        base: The base model, without edits in force.
        networks: The networks, which do not change.
        examples: The examples of this rank.
        weights: Weights of the loss of the new answers and of the classifier's.
    """
    outcome = _attempt(base, networks, examples, weights)
    if outcome.is_finite:
        return outcome
    kept = [example for example in examples if _is_finite_alone(base, networks, example, weights)]
    outcome = _attempt(base, networks, kept, weights, skipped=len(examples) - len(kept))
    if outcome.is_finite:
        return outcome
    return _attempt(base, networks, [], weights, skipped=len(examples))


def _attempt(
    base: BaseModel,
    networks: ScopeNetworks,
    examples: Sequence[EditExample],
    weights: tuple[float, float],
    skipped: int = 0,
) -> ScopeOutcome:
    facts = gather_over_ranks([example.requests[0].prompt for example in examples])
    found = _tally(base, networks, examples, facts)
    counts = torch.tensor([len(examples), skipped], device=found.counts.device)
    sum_over_ranks((found.counts, counts))
    shares = loss_weights(found.counts, *weights).to(found.losses)
    gradients = _gradients(networks, shares, found)
    losses = found.losses.detach().clone()
    sum_over_ranks((*gradients, losses, found.noted))
    total = Tally(losses, found.noted, found.counts)
    episodes, left_out = counts.tolist()
    return ScopeOutcome(gradients, shares, total, episodes, left_out)


def _tally(
    base: BaseModel,
    networks: ScopeNetworks,
    examples: Sequence[EditExample],
    facts: Sequence[str],
) -> Tally:
    if not examples:
        nothing = next(networks.parameters()).new_zeros(4)
        return Tally(nothing, nothing.clone(), nothing.long())
    with torch.enable_grad():
        return tally(base, networks, examples, facts)


def _gradients(networks: ScopeNetworks, shares: Tensor, found: Tally) -> list[Tensor]:
    """Gradient of this rank's part of the loss.

    That of the networks alone: no gradient is left on any tensor, and wrappers for several
    processes see nothing that they would reduce a second time.
    """
    parameters = list(networks.parameters())
    if not found.losses.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    with torch.enable_grad():
        return list(torch.autograd.grad((shares * found.losses).sum(), parameters))


def _is_finite_alone(
    base: BaseModel,
    networks: ScopeNetworks,
    example: EditExample,
    weights: tuple[float, float],
) -> bool:
    found = _tally(base, networks, [example], [example.requests[0].prompt])
    shares = loss_weights(found.counts, *weights).to(found.losses)
    return all_finite((found.losses, *_gradients(networks, shares, found)))
