"""Attribution of an answer to neurons of the MLPs by integrated gradients (Dai et al. 2022).

A neuron is an entry of what a down projection receives: the values after the activation, and after
the gate where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.base_models.taps import capture, change_inputs
from kedit_lightning.edits.projections import compute_dtype


@torch.no_grad()
def read_neurons(base: BaseModel, row: EncodedRow, modules: Sequence[str]) -> dict[str, Tensor]:
    """Neurons where a row's answer tokens are predicted. ``[answer tokens, d_in]`` by module."""
    rows = base.pad([row])
    with capture(base.model, modules) as seen:
        base.forward(rows)
    return {name: seen.inputs[name][0, rows.answer_columns[0]] for name in modules}


def probabilities(
    base: BaseModel, row: EncodedRow, token: int, patches: Sequence[tuple[str, Tensor]]
) -> Tensor:
    """Probability of one token of a row's answer, with the neurons of one layer replaced.

    All of the layer's neurons are replaced, at the column that predicts the token and nowhere else.

    Args:
        base: The base model, as its stack stands.
        row: A prompt with its answer.
        token: Number of the answer's token.
        patches: A module and what it is to receive, ``[d_in]``, for each run of the model.

    Returns:
        One probability a patch, in at least float32. Shape ``[patches]``.
    """
    rows = base.pad([row] * len(patches))
    column = int(rows.answer_columns[0, token])
    groups: dict[str, list[int]] = {}
    for number, (name, _) in enumerate(patches):
        groups.setdefault(name, []).append(number)

    def replace(numbers: list[int], x: Tensor) -> Tensor:
        x, at = x.clone(), torch.tensor(numbers, device=x.device)
        x[at, column] = torch.stack([patches[number][1] for number in numbers]).to(x)
        return x

    changes = {
        name: lambda x, numbers=numbers: replace(numbers, x) for name, numbers in groups.items()
    }
    with change_inputs(base.model, changes):
        logits = base.logits_at(rows, rows.answer_columns[:, token : token + 1])[:, 0]
    chosen = rows.answer_ids[:, token]
    shares = logits.to(compute_dtype(logits.dtype)).softmax(-1)
    return shares.gather(1, chosen[:, None])[:, 0]


def attributions(
    base: BaseModel, row: EncodedRow, modules: Sequence[str], steps: int, rows_at_once: int
) -> dict[str, Tensor]:
    """Attribution of the answer's probability to each neuron, summed over the answer's tokens.

    ``A_i = w_i ∫₀¹ ∂P(y | α w) / ∂w_i dα`` with all neurons ``w`` of a layer scaled together, by
    the midpoint rule: the sum over a layer is ``P(w) − P(0)``.  The tokens before each are those of
    the answer itself.

    Args:
        base: The base model, as its stack stands.
        row: A prompt with the answer.
        modules: Down projections.
        steps: Points of the integral.
        rows_at_once: Runs of the model in one pass; it changes no result.

    Returns:
        Shape ``[d_in]`` by module, in at least float32.
    """
    neurons = {
        name: values.to(compute_dtype(values.dtype))
        for name, values in read_neurons(base, row, modules).items()
    }
    scores = {name: torch.zeros_like(values[0]) for name, values in neurons.items()}
    runs = [(name, (step + 0.5) / steps) for name in modules for step in range(steps)]
    for token in range(len(row.answer)):
        for start in range(0, len(runs), rows_at_once):
            some = runs[start : start + rows_at_once]
            scaled = [(n, (at * neurons[n][token]).requires_grad_(True)) for n, at in some]
            total = probabilities(base, row, token, scaled).sum()
            gradients = torch.autograd.grad(total, [vector for _, vector in scaled])
            for (name, _), gradient in zip(some, gradients, strict=True):
                scores[name] += neurons[name][token] * gradient / steps
    return scores


def strongest(scores: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Numbers of the neurons whose attribution is at least a share of the largest.

    Args:
        scores: Attributions, ``[d_in]`` by module.
        threshold: That share.

    Returns:
        Shape ``[neurons]`` by module, for modules that have any; nothing if none is positive.
    """
    top = max(float(values.max()) for values in scores.values())
    if not top > 0:
        return {}
    chosen = {name: (v >= threshold * top).nonzero()[:, 0] for name, v in scores.items()}
    return {name: numbers for name, numbers in chosen.items() if len(numbers)}
