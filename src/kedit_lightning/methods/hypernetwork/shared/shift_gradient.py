"""The meta-gradient of MALMEN: the outer loss, back through the ridge regressions to the networks.

A training step has four stages, none of which holds the graph of more than one minibatch: the
factors of the requests are captured and kept on the host; the networks map them to value
differences, which are solved for shifts; the probes run with the shifts attached as leaf tensors;
and the gradients of these leaves are propagated back through the solves and, by minibatch, through
the networks.  The result is the gradient that autograd gives end to end.

Source: Tan et al. 2024, "Massive Editing for Large Language Models via Meta Learning", section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, autograd

from kedit_lightning.base_models import BaseModel
from kedit_lightning.methods.hypernetwork.shared.meta_gradient import MetaGradient
from kedit_lightning.methods.hypernetwork.shared.normal_equations import RidgeShift
from kedit_lightning.methods.hypernetwork.shared.outer_loss import outer_losses
from kedit_lightning.methods.hypernetwork.shared.parameter_shift import Part
from kedit_lightning.methods.hypernetwork.shared.value_networks import ValueNetworks
from kedit_lightning.methods.shared.losses import all_finite
from kedit_lightning.methods.training.distributed import is_first_rank, sum_over_ranks
from kedit_lightning.methods.training.episodes import Episode


@dataclass(frozen=True)
class WeightedEpisodes:
    """Episodes with the weight of their mean loss in the outer loss."""

    episodes: Sequence[Episode]
    weight: float = 1.0


def shift_gradient(
    base: BaseModel,
    network: ValueNetworks,
    parts: Sequence[Part],
    shifts: Mapping[str, RidgeShift],
    groups: Sequence[WeightedEpisodes],
    weights: tuple[float, float, float],
    at_once: int,
) -> MetaGradient:
    """Meta-gradient of the networks that shifts were computed with, over all ranks.

    The loss is the sum over groups of the mean over episodes, each mean times the group's weight.

    Args:
        base: The base model, without the shifts.
        network: The networks.
        parts: The factors that the shifts were computed from, those of this rank.
        shifts: The shifts.
        groups: The episodes whose probes are run; the first group holds those whose requests were
            written, and its losses are logged.
        weights: Weights of the edit loss, the locality loss and the squared norm of the shifts.
        at_once: Episodes whose probes run through the model together.
    """
    *probe_weights, norm_weight = weights
    leaves = {
        name: shift.unknown.to(network.log_rates.dtype).requires_grad_()
        for name, shift in shifts.items()
    }
    counts = network.log_rates.new_tensor([len(group.episodes) for group in groups])
    sum_over_ranks([counts])
    total = counts[0]
    scales = [group.weight * total / count for group, count in zip(groups, counts, strict=True)]
    sums, gradients = _leaf_gradients(base, shifts, leaves, groups, scales, probe_weights, at_once)
    sum_over_ranks(gradients.values())
    if norm_weight:
        norm = sum(shift.squared_norm(leaves[name]) for name, shift in shifts.items())
        cost = total * norm_weight * norm
        for name, gradient in zip(leaves, autograd.grad(cost, list(leaves.values())), strict=True):
            gradients[name] += gradient
        sums[0] += cost.detach() if is_first_rank() else 0
    parameter_gradients = _parameter_gradients(network, parts, shifts, gradients)
    result = MetaGradient(parameter_gradients, sums, len(groups[0].episodes), 0).over_ranks()
    if all_finite((result.sums, *result.gradients)):
        return result
    return MetaGradient.zero(network, skipped=result.episodes)


def _leaf_gradients(
    base: BaseModel,
    shifts: Mapping[str, RidgeShift],
    leaves: Mapping[str, Tensor],
    groups: Sequence[WeightedEpisodes],
    scales: Sequence[Tensor],
    weights: Sequence[float],
    at_once: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sums of a :class:`MetaGradient`, and the gradient of the outer loss in each leaf."""
    deltas = {name: shifts[name].delta(leaf) for name, leaf in leaves.items()}
    gradients = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    sums = scales[0].new_zeros(4)
    for number, (group, scale) in enumerate(zip(groups, scales, strict=True)):
        for first in range(0, len(group.episodes), at_once):
            episodes = group.episodes[first : first + at_once]
            with torch.enable_grad():
                losses = outer_losses(base, episodes, deltas, {})
                loss = weights[0] * losses.edit + weights[1] * losses.locality
                loss = scale.to(loss) * loss.sum()
                minibatch = autograd.grad(loss, list(leaves.values()))
            for name, gradient in zip(leaves, minibatch, strict=True):
                gradients[name] += gradient
            logged = (losses.edit, losses.locality, losses.success) if number == 0 else ()
            parts = [loss.detach(), *(part.detach().sum() for part in logged)]
            sums[: len(parts)] += torch.stack(parts).to(sums)
    return sums, gradients


def _parameter_gradients(
    network: ValueNetworks,
    parts: Sequence[Part],
    shifts: Mapping[str, RidgeShift],
    gradients: Mapping[str, Tensor],
) -> list[Tensor]:
    """This rank's part of the gradient of the parameters, from that of the solved unknowns."""
    adjoints = {name: shift.pull_back(gradients[name]) for name, shift in shifts.items()}
    parameters = list(network.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    first = dict.fromkeys(shifts, 0)
    for part in parts:
        with torch.enable_grad():
            terms = []
            for name, shift in shifts.items():
                factors = part[name].to(shift.factor.device)
                values = network.values(name, factors.inputs, factors.gradients)
                slopes = shift.gradient_of_values(adjoints[name][0], factors.inputs, first[name])
                terms.append((slopes.to(values) * values).sum())
                first[name] += len(factors.inputs)
            minibatch = autograd.grad(torch.stack(terms).sum(), parameters, allow_unused=True)
        for sum_, gradient in zip(total, minibatch, strict=True):
            if gradient is not None:
                sum_ += gradient
    if is_first_rank():  # equal on all ranks, whose gradients are added up
        ridges = network.log_ridges
        (place,) = [i for i, parameter in enumerate(parameters) if parameter is ridges]
        slopes = torch.stack([adjoints[name][1].to(ridges.device) for name in shifts])
        total[place] += slopes.to(ridges) * ridges.detach().exp()
    return total
