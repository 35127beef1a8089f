"""Independent optimisations in one loop, row by row, with the results of each alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, Self, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.effects import WeightDelta
from kedit_lightning.edits.projections import compute_dtype, projection_shape
from kedit_lightning.edits.weight_storage import device_of
from kedit_lightning.methods.shared.losses import gradients_of

#: Makes the optimizer of tensors.
OptimizerFactory: TypeAlias = Callable[[list[Tensor]], Optimizer]


class Rows(Protocol):
    """What the losses of rows are computed from, such as forward passes along their answers."""

    def select(self, index: Tensor) -> Self:
        """The same for some of the rows, by number. Shape of ``index``: ``[n]``."""


R = TypeVar("R", bound=Rows)


def adam(lr: float, weight_decay: float = 0.0) -> OptimizerFactory:
    """Adam, with an L2 penalty that is added to the gradient."""
    # One pass over the tensors a step, not ten: they may be as large as weights.
    return partial(torch.optim.Adam, lr=lr, weight_decay=weight_decay, fused=True)


def zero_change(module: nn.Module, dtype: torch.dtype) -> WeightDelta:
    """A trainable change, zero at first: dense ``[d_out, d_in]``, and bias ``[d_out]`` if any.

    It is kept in at least float32: in bfloat16 an entry of 0.02 could not move by less than 6e-5.
    """
    d_in, d_out = projection_shape(module)
    device = device_of(module)
    zeros = partial(torch.zeros, dtype=compute_dtype(dtype), device=device, requires_grad=True)
    bias = None if getattr(module, "bias", None) is None else zeros(d_out)
    return WeightDelta(None, zeros(d_out, d_in), bias)


def descend(optimizer: Optimizer, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """One step of an optimizer of tensors along their gradients."""
    for tensor, gradient in zip(tensors, gradients, strict=True):
        # Fused kernels on a CPU take a gradient for stored as the tensor is, whatever its strides.
        same = gradient.stride() == tensor.stride()
        tensor.grad = gradient if same else torch.empty_like(tensor).copy_(gradient)
    optimizer.step()


@dataclass
class RowResults:
    """What an optimisation gives for each row.

    Args:
        tensors: What was trained. Shape ``[n, ...]`` each.
        losses: Losses of each row, each taken before its update.
    """

    tensors: list[Tensor]
    losses: list[list[float]]


@dataclass(frozen=True)
class InnerLoop:
    """How rows are optimised.

    Args:
        optimizer: Makes the optimizer; it must treat each entry of a tensor by itself.
        steps: Steps of each row at most.
        stop_loss: A row with a lower loss is finished, without a further update.
        constrain: Changes the tensors in place after each update.
        where: What is trained, for errors.
    """

    optimizer: OptimizerFactory
    steps: int
    stop_loss: float = float("-inf")
    constrain: Callable[[Sequence[Tensor]], None] | None = None
    where: str = ""

    def run(
        self, rows: R, start: Sequence[Tensor], losses: Callable[[R, list[Tensor]], Tensor]
    ) -> RowResults:
        """Optimise all rows together.

        The losses of rows are added up, so that the gradient of a row is its own.  Those that are
        finished drop out of the passes, of the tensors and of the optimizer's state.

        Args:
            rows: What the losses are computed from; each belongs to an entry of the tensors.
            start: Where the optimisation starts. Shape ``[n, ...]`` each.
            losses: Loss of each of the rows that it is given, with their tensors. Shape ``[n]``.

        Raises:
            NonFiniteError: A loss became NaN or infinite.
        """
        found = [t.detach().clone(memory_format=torch.contiguous_format) for t in start]
        active = _ActiveRows(found, self.optimizer)
        history: list[list[float]] = [[] for _ in range(len(found[0]))]
        for _ in range(self.steps):
            each = losses(rows, active.tensors)
            values = each.detach().tolist()  # the one transfer from the device
            for number, value in zip(active.numbers, values, strict=True):
                history[number].append(value)
            if not all(map(_is_finite, values)):
                check_finite("loss", self.where, each.detach())
            kept = [i for i, value in enumerate(values) if value >= self.stop_loss]
            if not kept:
                break
            gradients = gradients_of(each[kept].sum(), active.tensors)
            del each
            if len(kept) < len(values):
                places, gradients = active.keep(kept, gradients, found)
                rows = rows.select(torch.tensor(places, device=found[0].device))
            active.step(gradients, self.constrain)
        active.store(found, range(len(active.numbers)))
        return RowResults(found, history)


@dataclass
class _ActiveRows:
    """The tensors of rows that are not finished, and the state of their optimizer."""

    found: Sequence[Tensor]
    factory: OptimizerFactory
    numbers: list[int] = field(init=False)
    tensors: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.numbers = list(range(len(self.found[0])))
        self.tensors = [tensor.clone().requires_grad_() for tensor in self.found]
        self._optimizer = self.factory(self.tensors)

    def step(
        self,
        gradients: Sequence[Tensor],
        constrain: Callable[[Sequence[Tensor]], None] | None,
    ) -> None:
        """Update the tensors."""
        descend(self._optimizer, self.tensors, gradients)
        self._optimizer.zero_grad()
        if constrain is not None:
            with torch.no_grad():
                constrain(self.tensors)

    def store(self, found: Sequence[Tensor], rows: Iterable[int]) -> None:
        """Write the tensors of some of these rows into those of all."""
        for row in rows:
            for whole, tensor in zip(found, self.tensors, strict=True):
                whole[self.numbers[row]] = tensor.detach()[row]

    def keep(
        self, kept: Sequence[int], gradients: Sequence[Tensor], found: Sequence[Tensor]
    ) -> tuple[list[int], tuple[Tensor, ...]]:
        """Store the rows that are finished, and drop them.

        Tensors, which may be as large as weights, stay in the memory that they have.

        Returns:
            The rows that are ``kept``, in their new order, and their gradients.
        """
        self.store(found, set(range(len(self.numbers))) - set(kept))
        places = _with_gaps_filled(kept)
        self.numbers = [self.numbers[row] for row in places]
        (group,), state = self._optimizer.param_groups, self._optimizer.state
        tensors: list[Tensor] = []
        for old in self.tensors:
            new = _moved(old.detach(), places).requires_grad_()
            own: dict[str, Any] = state.pop(old, {})
            state[new] = {
                name: _moved(value, places) if _has_rows(value, old) else value
                for name, value in own.items()
            }
            tensors.append(new)
        self.tensors = group["params"] = tensors
        # Two gradients may share memory; they are not moved within it.
        return places, tuple(gradient[places] for gradient in gradients)


def _with_gaps_filled(kept: Sequence[int]) -> list[int]:
    """The rows that are kept, with the last ones in the places of those that are not.

    >>> _with_gaps_filled([0, 2, 3, 5])
    [0, 5, 2, 3]
    """
    staying = {row for row in kept if row < len(kept)}
    others = [row for row in kept if row >= len(kept)]
    return [row if row in staying else others.pop() for row in range(len(kept))]


def _moved(tensor: Tensor, places: Sequence[int]) -> Tensor:
    """The front of a tensor, to which the rows named have been moved."""
    for place, row in enumerate(places):
        if place != row:
            tensor[place] = tensor[row]
    return tensor[: len(places)]


def _has_rows(value: object, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape


def _is_finite(value: float) -> bool:
    return value - value == 0.0
