"""The parameter shift of each projection from the gradients of many requests.

The factors of the requests are captured in minibatches and kept on the host; the networks map them
to value differences; one ridge regression for each projection gives its shift.

Source: Tan et al. 2024, "Massive Editing for Large Language Models via Meta Learning", section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.taps import capture
from kedit_lightning.edits import DenseEdit, Edit, EditOrigin, LowRankDelta, LowRankEdit
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.hypernetwork.shared.normal_equations import (
    NormalEquations,
    RidgeShift,
    smaller_dense,
)
from kedit_lightning.methods.hypernetwork.shared.outer_loss import probe_rows
from kedit_lightning.methods.hypernetwork.shared.tensor_file import TensorFile
from kedit_lightning.methods.hypernetwork.shared.value_networks import ValueNetworks
from kedit_lightning.methods.shared.answer_passes import encoded_answers
from kedit_lightning.methods.shared.gradient_factors import Factors, capture_factors, predicting
from kedit_lightning.methods.training.episodes import Episode
from kedit_lightning.requests import EditRequest, Probe

#: Factors of a minibatch of requests, by projection.
Part = dict[str, Factors]


def minibatches(lengths: Sequence[int], at_once: int) -> Iterator[slice]:
    """Slices of consecutive rows, by their numbers of tokens, that run through the model together.

    Rows are padded to the longest of their minibatch, so one long row would multiply the memory of
    a pass.  A minibatch therefore has at most ``at_once`` rows, and at most 1.5 times the tokens,
    padding included, of ``at_once`` rows of mean length.
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
    """Factors of requests in minibatches of at most ``at_once``, with applied edits in force."""
    encoded = encoded_answers(base, requests)
    lengths = [len(row.prompt) + len(row.answer) for row in encoded]
    for minibatch in minibatches(lengths, at_once):
        rows = base.pad(encoded[minibatch])
        at = predicting(rows) if network.plan.tokens == "answer" else None
        yield capture_factors(base, rows, network.plan.modules, at)


def update_key_covariances(
    base: BaseModel,
    network: ValueNetworks,
    parts: Sequence[Part],
    probes: Sequence[Probe],
    at_once: int,
) -> None:
    """Update the key covariances of the networks with the keys of requests and of their probes.

    A probe without an answer gives the key of its last token.
    """
    keys = {name: [part[name].inputs for part in parts] for name in network.shapes}
    for first in range(0, len(probes), at_once):
        rows = probe_rows(base, probes[first : first + at_once])
        if network.plan.tokens == "answer":
            at = predicting(rows)
            at[torch.arange(len(rows)), rows.prompt_end] = True
        else:
            at = rows.attention_mask.bool()
        with torch.no_grad(), capture(base.model, list(keys)) as captured:
            base.answer_logits(rows)
        for name, chunks in keys.items():
            inputs = captured.inputs[name]
            chunks.append(inputs[at.to(inputs.device)].to("cpu"))
    network.update_key_covariances({name: torch.cat(chunks) for name, chunks in keys.items()})


@torch.no_grad()
def accumulate(
    network: ValueNetworks, parts: Iterable[Part], file: TensorFile
) -> dict[str, NormalEquations]:
    """The normal equations of each projection; the file holds their rows until they are solved."""
    equations = {name: NormalEquations(*shape, file) for name, shape in network.shapes.items()}
    for part in parts:
        for name, host in part.items():
            factors = host.to(network.log_rates.device)
            values = network.values(name, factors.inputs, factors.gradients)
            equations[name].add(factors.inputs, values)
        del part, host, factors, values  # before the next minibatch is captured
    return equations


def solve(
    network: ValueNetworks, name: str, equations: NormalEquations, over_ranks: bool = False
) -> RidgeShift:
    """The shift of a projection, with its learned ridge."""
    return equations.solve(network.ridge(name), network.metric(name), over_ranks)


def shift_edit(
    base: BaseModel, shifts: Iterable[tuple[str, RidgeShift]], dense: bool, origin: EditOrigin
) -> Edit:
    """The edit that adds shifts to the weights; they are freed one by one.

    It is stored as dense matrices where :func:`smaller_dense` holds for all of them together.
    """
    dtype = compute_dtype(base.dtype)
    matrices: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    factors: dict[str, LowRankDelta] = {}
    for name, shift in shifts:  # contiguous, as loaded files are, for equal sums
        if dense:
            matrices[name] = (shift.matrix.T.to(dtype).contiguous(), None)
        else:
            assert shift.keys is not None
            b = shift.unknown.T.to(dtype).contiguous()
            factors[name] = LowRankDelta(shift.keys.to(dtype), b)
        del shift  # before the next is solved
    return DenseEdit(base, matrices, origin) if dense else LowRankEdit(base, factors, origin)


def compute_shift_edit(
    base: BaseModel,
    network: ValueNetworks,
    requests: Sequence[EditRequest],
    at_once: int,
    origin: EditOrigin,
) -> Edit:
    """One edit of all requests, by one solve for each projection. Statistics do not change.

    Edits on the stack are in force, and ``at_once`` requests run through the model together.

    Raises:
        NonFiniteError: Factors of a projection are NaN, or its ridge has vanished.
        TemporaryFileError: There is no space for rows that wait for the solve.
    """
    parts = capture_parts(base, network, requests, at_once)
    with TensorFile() as file:
        equations = accumulate(network, parts, file)
        dense = smaller_dense(system.sizes for system in equations.values())
        shifts = ((name, solve(network, name, equations.pop(name))) for name in network.shapes)
        return shift_edit(base, shifts, dense, origin)


def training_shifts(
    base: BaseModel, network: ValueNetworks, episodes: Sequence[Episode], at_once: int
) -> tuple[list[Part], dict[str, RidgeShift]]:
    """The shifts that write the requests of episodes together; statistics are updated.

    Returns:
        The factors of this rank's requests, on the CPU, and the shifts by projection, which write
        the requests of all ranks.
    """
    requests = [request for episode in episodes for request in episode.requests]
    parts = []
    for part in capture_parts(base, network, requests, at_once):
        network.update_statistics([part])
        parts.append({name: factors.to("cpu") for name, factors in part.items()})
    if network.plan.shift_size == "keys":
        probes = [probe for episode in episodes for probe in (*episode.asked, *episode.kept)]
        update_key_covariances(base, network, parts, probes, at_once)
    with TensorFile() as file:
        equations = accumulate(network, parts, file)
        return parts, {n: solve(network, n, system, True) for n, system in equations.items()}
