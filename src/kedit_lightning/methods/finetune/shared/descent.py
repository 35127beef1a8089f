"""Training a change of weights: its own tensors, a box around them, and Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from kedit_lightning.base_models.taps import visiting
from kedit_lightning.edits.effects import WeightDelta
from kedit_lightning.edits.projections import compute_dtype, projection_shape

#: Updates from which on a progress bar is shown.
_LONG = 300


@dataclass(frozen=True)
class Recipe:
    """How a change is trained.

    Args:
        lr: Step size of Adam.
        epochs: Most passes over all rows.
        batch_size: Rows a step looks at.
        weight_decay: Pulls the change towards zero; added to its gradient.
        box: Largest absolute value of any entry of the change.
        stop_loss: A batch whose loss is below it is skipped, and training ends once the mean over
            an epoch is.
    """

    lr: float
    epochs: int
    batch_size: int
    weight_decay: float
    box: float
    stop_loss: float


def zero_change(module: nn.Module, dtype: torch.dtype) -> WeightDelta:
    """A change of a projection that is zero and can be trained.

    It has a bias where the module has one.  It is held in at least float32: in bfloat16 an entry
    of 0.02 could not move by less than 6e-5.
    """
    d_in, d_out = projection_shape(module)
    options: dict[str, Any] = {
        "dtype": compute_dtype(dtype),
        "device": next(module.parameters()).device,
        "requires_grad": True,
    }
    has_bias = getattr(module, "bias", None) is not None
    bias = torch.zeros(d_out, **options) if has_bias else None
    return WeightDelta(None, torch.zeros(d_out, d_in, **options), bias)


def tensors_of(changes: Mapping[str, WeightDelta]) -> list[Tensor]:
    """All tensors that are trained."""
    parts = [part for change in changes.values() for part in (change.dense, change.bias)]
    return [part for part in parts if part is not None]


@contextmanager
def attached(model: nn.Module, changes: Mapping[str, WeightDelta]) -> Iterator[None]:
    """Inside, the model runs with the changes on top of whatever edits are applied."""
    with visiting(model, changes):
        yield


def descend(
    tensors: Sequence[Tensor],
    rows: int,
    loss_of: Callable[[list[int]], Tensor],
    recipe: Recipe,
    generator: torch.Generator,
) -> list[float]:
    """Train tensors in place, in ordinary epochs over shuffled rows.

    Args:
        tensors: What is trained; zero at the start.
        rows: How many rows there are.
        loss_of: Mean loss of the rows with these indices.
        recipe: How to train.
        generator: Source of the order of rows.

    Returns:
        Mean loss of each epoch, before the updates of its batches.
    """
    optimizer = torch.optim.Adam(tensors, lr=recipe.lr, weight_decay=recipe.weight_decay)
    batches = -(-rows // recipe.batch_size)
    history: list[float] = []
    epochs = track(
        range(recipe.epochs),
        "Fine-tuning",
        console=Console(stderr=True),
        transient=True,
        disable=recipe.epochs * batches < _LONG,
    )
    for _ in epochs:
        order = torch.randperm(rows, generator=generator)
        total = 0.0
        for chosen in order.split(recipe.batch_size):
            # Sorted, so that a batch of all rows is the same in every epoch.
            loss = loss_of(sorted(chosen.tolist()))
            value = float(loss.detach())
            total += value * len(chosen)
            if value < recipe.stop_loss:
                continue
            gradients = torch.autograd.grad(loss, list(tensors))
            step(optimizer, tensors, gradients, recipe.box)
        history.append(total / rows)
        if history[-1] < recipe.stop_loss:
            break
    return history


def step(
    optimizer: torch.optim.Optimizer,
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor],
    box: float,
) -> None:
    """Take one step of an optimizer, and put every entry back into the box around zero."""
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
    optimizer.step()
    with torch.no_grad():
        for tensor in tensors:
            tensor.clamp_(-box, box)
