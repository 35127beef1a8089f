"""The gradient of a training step of SERAC, over the examples of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits.kinds.scope.scope_networks import ScopeNetworks
from kedit_lightning.methods.memory.serac.scope_losses import (
    LossSums,
    Question,
    loss_sums,
    loss_weights,
    question_of,
)
from kedit_lightning.methods.shared.losses import all_finite
from kedit_lightning.methods.training.distributed import gather_over_ranks, sum_over_ranks
from kedit_lightning.requests import EditExample


@dataclass(frozen=True)
class ScopeGradient:
    """Loss and gradient of a training batch, over all ranks; a ``BatchGradient``.

    ``scalars`` are both losses without their weights, and the accuracies of both networks.
    """

    mean_gradients: list[Tensor]
    loss: Tensor
    scalars: dict[str, Tensor]
    episodes: int
    skipped: int

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are finite."""
        return all_finite((self.loss, *self.mean_gradients))


def scope_gradient(
    base: BaseModel,
    networks: ScopeNetworks,
    examples: Sequence[EditExample],
    weights: tuple[float, float],
) -> ScopeGradient:
    """Losses and gradient of the examples of all ranks; every rank takes part in each call.

    If the gradient is not finite, examples whose own gradient is not finite are left out; if it
    still is not, all are.

    Args:
        base: The base model, without edits in force.
        networks: The networks, which do not change.
        examples: The examples of this rank.
        weights: Weights of the edit loss and of the loss of the scope classifier.
    """
    gradient = _gradient(base, networks, examples, weights)
    if gradient.is_finite:
        return gradient
    kept = [example for example in examples if _is_finite_alone(base, networks, example, weights)]
    gradient = _gradient(base, networks, kept, weights, skipped=len(examples) - len(kept))
    if gradient.is_finite:
        return gradient
    return _gradient(base, networks, [], weights, skipped=len(examples))


def _gradient(
    base: BaseModel,
    networks: ScopeNetworks,
    examples: Sequence[EditExample],
    weights: tuple[float, float],
    skipped: int = 0,
) -> ScopeGradient:
    facts = gather_over_ranks([question_of(example) for example in examples])
    sums = _loss_sums(base, networks, examples, facts)
    examined = torch.tensor([len(examples), skipped], device=sums.counts.device)
    sum_over_ranks((sums.counts, examined))
    scales = loss_weights(sums.counts, *weights).to(sums.losses)
    gradients = _parameter_gradients(networks, scales, sums)
    losses, hits, counts = sums.losses.detach().clone(), sums.hits, sums.counts
    sum_over_ranks((*gradients, losses, hits))
    scalars = {
        "loss_edit": losses[3] / counts[3],
        "loss_scope": (loss_weights(counts, 0.0, 1.0).to(losses) * losses).sum(),
        "edit_success": hits[3] / counts[3],
        "scope_hits": hits[0] / counts[0],
        "scope_false_alarms": hits[1:3].sum() / counts[1:3].sum().clamp(min=1),
    }
    return ScopeGradient(gradients, (scales * losses).sum(), scalars, *examined.tolist())


def _loss_sums(
    base: BaseModel,
    networks: ScopeNetworks,
    examples: Sequence[EditExample],
    facts: Sequence[Question],
) -> LossSums:
    if not examples:
        zeros = next(networks.parameters()).new_zeros(4)
        return LossSums(zeros, zeros.clone(), zeros.long())
    with torch.enable_grad():
        return loss_sums(base, networks, examples, facts)


def _parameter_gradients(networks: ScopeNetworks, scales: Tensor, sums: LossSums) -> list[Tensor]:
    """Gradient of this rank's part of the loss; sets no ``.grad``, which DDP would reduce again."""
    parameters = list(networks.parameters())
    if not sums.losses.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    with torch.enable_grad():
        return list(torch.autograd.grad((scales * sums.losses).sum(), parameters))


def _is_finite_alone(
    base: BaseModel, networks: ScopeNetworks, example: EditExample, weights: tuple[float, float]
) -> bool:
    sums = _loss_sums(base, networks, [example], [question_of(example)])
    scales = loss_weights(sums.counts, *weights).to(sums.losses)
    return all_finite((sums.losses, *_parameter_gradients(networks, scales, sums)))
