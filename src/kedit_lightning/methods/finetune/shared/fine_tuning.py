"""Trainable changes of projections, and the epochs of fine-tuning methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from kedit_lightning.methods.shared.inner_loop import adam, descend
from kedit_lightning.methods.shared.losses import gradients_of
from kedit_lightning.notices import bars_are_hidden

#: Optimizer steps from which on a progress bar is shown.
_LONG = 300


def clamped(tensors: Sequence[Tensor], bound: float) -> None:
    """Clamp each entry to a bound in absolute value, in place."""
    if bound < math.inf:
        for tensor in tensors:
            tensor.clamp_(-bound, bound)


def fine_tune(
    tensors: Sequence[Tensor],
    rows: int,
    loss: Callable[[list[int]], Tensor],
    generator: torch.Generator,
    *,
    lr: float,
    epochs: int,
    batch_size: int = 1,
    weight_decay: float = 0.0,
    norm_constraint: float = math.inf,
    stop_loss: float = 0.0,
    after_step: Callable[[int], None] | None = None,
    project: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
    buffer: int = 0,
    replay: int = 0,
) -> list[float]:
    """Train tensors in place with Adam, in epochs over shuffled rows.

    Behind the rows there may be a ``buffer`` of so many more, of which each epoch draws ``replay``.
    ``loss`` maps the indices of rows to their mean loss, a scalar.  ``weight_decay`` is an L2
    penalty, added to the gradient.  Each entry is clamped to ``norm_constraint`` in absolute value
    after each step.  A batch with a loss below ``stop_loss`` is skipped, and training ends after an
    epoch with a mean loss below it.  ``after_step`` is called after each step of
    the optimizer with its number, from 1, while the tensors still have their gradients.
    ``project`` changes gradients before the optimizer sees them.

    Returns:
        Mean loss of each epoch, each batch's taken before its update.
    """
    optimizer = adam(lr, weight_decay)(list(tensors))
    history: list[float] = []
    steps = 0
    progress = track(
        range(epochs),
        "Fine-tuning",
        console=Console(stderr=True),
        transient=True,
        disable=bars_are_hidden() or epochs * -(-rows // batch_size) < _LONG,
    )
    for _ in progress:
        total = 0.0
        order = torch.arange(rows)
        if buffer:
            drawn = rows + torch.randperm(buffer, generator=generator)[:replay]
            order = torch.cat([order, drawn])
        order = order[torch.randperm(len(order), generator=generator)]
        for batch in order.split(batch_size):
            # Sorted, so that a batch of all rows is the same in every epoch.
            batch_loss = loss(sorted(batch.tolist()))
            value = float(batch_loss.detach())
            total += value * len(batch)
            if value < stop_loss:
                continue
            gradients: Sequence[Tensor] = gradients_of(batch_loss, tensors)
            if project is not None:
                gradients = project(gradients)
            descend(optimizer, tensors, gradients)
            with torch.no_grad():
                clamped(tensors, norm_constraint)
            steps += 1
            if after_step is not None:
                after_step(steps)
        history.append(total / len(order))
        if history[-1] < stop_loss:
            break
    return history
