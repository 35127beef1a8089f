"""Many requests in one shift of each projection, and the gradient of a training step.

A step has four stages, none of which holds more than one minibatch's graph: factors of the requests
are read and kept on the host; the networks turn them into wanted changes of values, which are
solved for shifts; the questions are asked with the shifts attached as leaves; and the gradients
with respect to these leaves are taken back through the solves and, by minibatch, through the
networks.  The result is the gradient that autograd gives end to end.

Source: Tan et al. 2024, "Massive Editing for Large Language Models via Meta Learning", section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, autograd

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.taps import capture
from kedit_lightning.edits import DenseEdit, Edit, EditOrigin, LowRankEdit
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.hypernetwork.malmen.normal_equations import NormalEquations, RidgeShift
from kedit_lightning.methods.hypernetwork.malmen.tensor_file import TensorFile
from kedit_lightning.methods.hypernetwork.malmen.value_networks import ValueNetworks
from kedit_lightning.methods.hypernetwork.shared.attach import Change, DenseChange, LowRankChange
from kedit_lightning.methods.hypernetwork.shared.outcome import Outcome
from kedit_lightning.methods.hypernetwork.shared.outer_loss import episode_losses, probe_rows
from kedit_lightning.methods.shared.gradient_factors import Factors, capture_factors, predicting
from kedit_lightning.methods.shared.losses import all_finite
from kedit_lightning.methods.training.distributed import is_first_rank, sum_over_ranks
from kedit_lightning.methods.training.episodes import Episode
from kedit_lightning.requests import EditRequest, Probe

#: Factors of the projections, by name.
Part = dict[str, Factors]


@dataclass(frozen=True)
class Weights:
    """How the parts of a loss count.

    Args:
        edit: Weight of the negative log-likelihood of the new answers.
        locality: Weight of the divergence on unrelated questions.
        size: Weight of the squared norm of the shifts.
    """

    edit: float
    locality: float
    size: float = 0.0


@dataclass(frozen=True)
class Group:
    """Examples whose questions are asked.

    Args:
        examples: The questions of one example each.
        weight: How their mean loss counts.
    """

    examples: Sequence[Episode]
    weight: float = 1.0


def minibatches(lengths: Sequence[int], at_once: int) -> Iterator[slice]:
    """Rows that run through the model together, in order.

    Rows are padded to the longest beside them, so a single long one would multiply the memory of a
    pass; the more rows, the longer their longest.  A minibatch therefore ends where it would have
    more than half as many tokens again, padding included, as ``at_once`` rows of mean length.

    Args:
        lengths: Tokens of each row.
        at_once: Most rows of a minibatch.
    """
    most = 1.5 * at_once * sum(lengths) / max(1, len(lengths))
    first, longest = 0, 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        count = number - first
        if count and (count == at_once or (count + 1) * longest > most):
            yield slice(first, number)
            first, longest = number, length
    if first < len(lengths):
        yield slice(first, len(lengths))


def capture_parts(
    base: BaseModel, network: ValueNetworks, requests: Sequence[EditRequest], at_once: int
) -> Iterator[Part]:
    """Factors of requests, at most ``at_once`` at a time, with the edits on the stack in force."""
    encoded = [base.encode(r.prompt, r.target_new) for r in requests]
    lengths = [len(row.prompt) + len(row.answer) for row in encoded]
    for some in minibatches(lengths, at_once):
        rows = base.pad(encoded[some])
        at = predicting(rows) if network.plan.tokens == "answer" else None
        yield capture_factors(base, rows, network.plan.modules, at)


def meet_keys(
    base: BaseModel,
    network: ValueNetworks,
    parts: Sequence[Part],
    questions: Sequence[Probe],
    at_once: int,
) -> None:
    """Take the keys of requests and of questions into what the networks measure shifts on.

    Args:
        base: The base model, with the edits on its stack in force.
        network: The networks.
        parts: The factors of the requests.
        questions: What is asked of the examples, ``at_once`` at a time. A question without an
            answer counts by its last token.
        at_once: Rows that run through the model together.
    """
    met = {name: [part[name].inputs for part in parts] for name in network.shapes}
    for first in range(0, len(questions), at_once):
        rows = probe_rows(base, questions[first : first + at_once])
        if network.plan.tokens == "answer":
            at = predicting(rows)
            at[torch.arange(len(rows)), rows.prompt_end] = True
        else:
            at = rows.attention_mask.bool()
        with torch.no_grad(), capture(base.model, list(met)) as seen:
            base.answer_logits(rows)
        for name, keys in met.items():
            inputs = seen.inputs[name]
            keys.append(inputs[at.to(inputs.device)].to("cpu"))
    network.meet({name: torch.cat(keys) for name, keys in met.items()})


@torch.no_grad()
def collect(
    network: ValueNetworks, parts: Iterable[Part], file: TensorFile
) -> dict[str, NormalEquations]:
    """The equations of each projection, from the factors of all requests.

    Args:
        network: The networks.
        parts: Factors of the requests.
        file: Where rows of the equations wait until these are solved.
    """
    equations = {name: NormalEquations(*shape, file) for name, shape in network.shapes.items()}
    for part in parts:
        for name, factors in part.items():
            own = factors.to(network.log_rates.device)
            equations[name].add(own.inputs, network.values(name, own.inputs, own.gradients))
        del part, factors, own  # before the next are captured
    return equations


def solve(
    network: ValueNetworks, name: str, equations: NormalEquations, over_ranks: bool = False
) -> RidgeShift:
    """The shift of a projection, with the ridge that the networks have learned."""
    return equations.solve(network.ridge(name), network.metric(name), over_ranks)


def edit_of(
    base: BaseModel, shifts: Iterable[tuple[str, RidgeShift]], dense: bool, origin: EditOrigin
) -> Edit:
    """Shifts as an edit.

    Args:
        base: The base model.
        shifts: Names of projections and their shifts, which are let go of one by one.
        dense: Whether they are kept as dense matrices; :func:`smaller_dense` of all of them.
        origin: Where the edit comes from.
    """
    dtype = compute_dtype(base.dtype)
    deltas: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, shift in shifts:  # contiguous, as files give them back, for equal sums
        if dense:
            deltas[name] = (shift.matrix.T.to(dtype).contiguous(), None)
        else:
            assert shift.keys is not None
            factors[name] = (shift.keys.to(dtype), shift.unknown.T.to(dtype).contiguous())
        del shift  # before the next is solved
    return DenseEdit(base, deltas, origin) if dense else LowRankEdit(base, factors, origin)


def learn_shifts(
    base: BaseModel,
    network: ValueNetworks,
    parts: Sequence[Part],
    shifts: Mapping[str, RidgeShift],
    asked: Sequence[Group],
    weights: Weights,
    at_once: int,
) -> Outcome:
    """Losses and gradient of the examples that shifts were computed for, over all ranks.

    The loss is the sum over groups of the mean over examples, each mean times the group's weight.

    Args:
        base: The base model, without the shifts.
        network: The networks.
        parts: The factors that the shifts came from, those of this rank.
        shifts: The shifts.
        asked: Weight and examples of each group; the first holds the examples whose requests
            were written, and its questions are what is reported.
        weights: Weights of the parts of the loss.
        at_once: Examples whose questions run through the model together.
    """
    leaves = {
        name: shift.unknown.to(network.log_rates.dtype).requires_grad_()
        for name, shift in shifts.items()
    }
    counts = network.log_rates.new_tensor([len(group.examples) for group in asked])
    sum_over_ranks([counts])
    total = counts[0]
    shares = [group.weight * total / own for group, own in zip(asked, counts, strict=True)]
    sums, gradients = _ask(base, shifts, leaves, asked, shares, weights, at_once)
    sum_over_ranks(gradients.values())
    if weights.size:
        size = sum(shift.squared_norm(leaves[name]) for name, shift in shifts.items())
        cost = total * weights.size * size
        for name, own in zip(leaves, autograd.grad(cost, list(leaves.values())), strict=True):
            gradients[name] += own
        sums[0] += cost.detach() if is_first_rank() else 0
    learned = _through_networks(network, parts, shifts, gradients)
    outcome = Outcome(learned, sums, len(asked[0].examples), 0).over_ranks()
    if all_finite((outcome.sums, *outcome.gradients)):
        return outcome
    return Outcome.nothing(network, skipped=outcome.episodes)


def _ask(
    base: BaseModel,
    shifts: Mapping[str, RidgeShift],
    leaves: Mapping[str, Tensor],
    asked: Sequence[Group],
    shares: Sequence[Tensor],
    weights: Weights,
    at_once: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Ask the questions of all groups under the leaves.

    Returns:
        The sums of an outcome, and the gradient with respect to each leaf.
    """
    changes = {name: _change(shifts[name], leaf) for name, leaf in leaves.items()}
    gradients = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    sums = shares[0].new_zeros(4)
    for number, (group, share) in enumerate(zip(asked, shares, strict=True)):
        for first in range(0, len(group.examples), at_once):
            some = group.examples[first : first + at_once]
            with torch.enable_grad():
                losses = episode_losses(base, some, changes)
                loss = weights.edit * losses.edit + weights.locality * losses.locality
                loss = share.to(loss) * loss.sum()
                found = autograd.grad(loss, list(leaves.values()))
            for name, own in zip(leaves, found, strict=True):
                gradients[name] += own
            seen = (losses.edit, losses.locality, losses.right) if number == 0 else ()
            parts = [loss.detach(), *(part.detach().sum() for part in seen)]
            sums[: len(parts)] += torch.stack(parts).to(sums)
    return sums, gradients


def _change(shift: RidgeShift, leaf: Tensor) -> Change:
    return DenseChange(leaf) if shift.keys is None else LowRankChange(shift.keys.to(leaf), leaf)


def _through_networks(
    network: ValueNetworks,
    parts: Sequence[Part],
    shifts: Mapping[str, RidgeShift],
    gradients: Mapping[str, Tensor],
) -> list[Tensor]:
    """This rank's share of the gradient of the parameters, from that of the solved unknowns."""
    pulled = {name: shift.pull_back(gradients[name]) for name, shift in shifts.items()}
    parameters = list(network.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    first = dict.fromkeys(shifts, 0)
    for part in parts:
        with torch.enable_grad():
            terms = []
            for name, shift in shifts.items():
                own = part[name].to(shift.factor.device)
                values = network.values(name, own.inputs, own.gradients)
                slopes = shift.gradient_of_values(pulled[name][0], own.inputs, first[name])
                terms.append((slopes.to(values) * values).sum())
                first[name] += len(own.inputs)
            found = autograd.grad(torch.stack(terms).sum(), parameters, allow_unused=True)
        for sum_, gradient in zip(total, found, strict=True):
            if gradient is not None:
                sum_ += gradient
    if is_first_rank():  # all ranks know this part alike, and their gradients are added up
        ridges = network.log_ridges
        (place,) = [i for i, parameter in enumerate(parameters) if parameter is ridges]
        slopes = torch.stack([pulled[name][1].to(ridges.device) for name in shifts])
        total[place] += slopes.to(ridges) * ridges.detach().exp()
    return total
