"""What edits do to one module, and how several of them act together.

A module carries at most one forward hook.  Weight patches add up; patches that look at the rows
(memories) act on the result, in the order of the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kedit_lightning.edits.context import RowContext
from kedit_lightning.edits.modules import (
    as_rows,
    compute_dtype,
    first_tensor,
    projection_shape,
    with_first,
)
from kedit_lightning.errors import UnsupportedUseError

#: Takes a module's input, its output and the row context; returns the new output.
RowFunction: TypeAlias = Callable[[Tensor, Tensor, RowContext], Tensor]


@dataclass(frozen=True)
class LowRankPatch:
    """Adds ``(x Aᵀ) Bᵀ``.

    Args:
        a: Shape ``[rank, d_in]``.
        b: Shape ``[d_out, rank]``.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class DensePatch:
    """Adds ``x Dᵀ + bias``.

    Args:
        delta: Shape ``[d_out, d_in]``; ``None`` when only the bias changes.
        bias: Shape ``[d_out]``.
    """

    delta: Tensor | None
    bias: Tensor | None = None


@dataclass(frozen=True)
class MemoryPatch:
    """Changes the output of some rows; patches of one ``family`` on a module act as one.

    Args:
        family: Patches with equal families are handed to ``build`` together.
        build: Turns the states of all patches of the family, in stack order, into a function.
        content: What this patch adds.
    """

    family: Hashable
    build: Callable[[Sequence[Any]], RowFunction]
    content: Any


Patch: TypeAlias = LowRankPatch | DensePatch | MemoryPatch


@dataclass(frozen=True)
class WeightSum:
    """All weight patches of a module in one: a low-rank part, a dense part and a bias."""

    a: Tensor | None
    b: Tensor | None
    delta: Tensor | None
    bias: Tensor | None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the change to ``y`` of shape ``[..., d_out]``, in at least float32."""
        dtype = compute_dtype(y.dtype)
        x = x.to(dtype)
        change: Tensor | None = None
        if self.a is not None and self.b is not None:
            change = (x @ self.a.to(dtype).T) @ self.b.to(dtype).T
        if self.delta is not None:
            part = x @ self.delta.to(dtype).T
            change = part if change is None else change + part
        if self.bias is not None:
            change = self.bias.to(dtype) if change is None else change + self.bias.to(dtype)
        assert change is not None
        return (y.to(dtype) + change).to(y.dtype)


def sum_weights(patches: Sequence[LowRankPatch | DensePatch], module: nn.Module) -> WeightSum:
    """Fold weight patches; low-rank ones stay factors until a dense matrix is cheaper to apply.

    The result is a pure function of the ordered patches, so rolling back and re-applying gives the
    same numbers.
    """
    device = next(module.parameters()).device
    low = [p for p in patches if isinstance(p, LowRankPatch)]
    dense = [p.delta for p in patches if isinstance(p, DensePatch) and p.delta is not None]
    biases = [p.bias for p in patches if isinstance(p, DensePatch) and p.bias is not None]
    a = torch.cat([p.a.to(device) for p in low]) if low else None
    b = torch.cat([p.b.to(device) for p in low], dim=1) if low else None
    delta = _total(dense, device)
    d_in, d_out = projection_shape(module)
    if a is not None and b is not None and a.shape[0] * (d_in + d_out) > d_in * d_out:
        dtype = compute_dtype(a.dtype)
        folded = b.to(dtype) @ a.to(dtype)
        a = b = None
        delta = folded if delta is None else delta + folded
    return WeightSum(a, b, delta, _total(biases, device))


def _total(tensors: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """Sum in at least float32, without holding copies of all terms; one term is not copied."""
    moved = (tensor.to(device) for tensor in tensors)
    return reduce(lambda x, y: x.to(compute_dtype(x.dtype)) + y, moved) if tensors else None


class ModuleHook:
    """The forward hook of one edited module."""

    def __init__(self, module: nn.Module, patches: Sequence[Patch]) -> None:
        weights = [p for p in patches if isinstance(p, (LowRankPatch, DensePatch))]
        self.weights = sum_weights(weights, module) if weights else None
        families: dict[Hashable, list[MemoryPatch]] = {}
        for patch in patches:
            if isinstance(patch, MemoryPatch):
                families.setdefault(patch.family, []).append(patch)
        self.memories = [
            group[0].build([patch.content for patch in group]) for group in families.values()
        ]

    def __call__(self, args: tuple[Any, ...], output: Any, context: RowContext | None) -> Any:
        """Return the changed output of the module."""
        x, y = args[0], first_tensor(output)
        if self.weights is not None:
            y = self.weights(x, y)
        if self.memories:
            context = _known(context)
            rows = len(context.prompt_end)
            x, shape, y = as_rows(x, rows), y.shape, as_rows(y, rows)
            for memory in self.memories:
                y = memory(x, y, context)
            y = y.reshape(shape)
        return with_first(output, y)


@dataclass(frozen=True)
class RowsHook:
    """The forward hook of a module whose rows carry different edits.

    Args:
        rows: Number of rows that edits were given for.
        shared: What happens to rows without an edit of their own.
        groups: Rows, and what happens to them.
    """

    rows: int
    shared: ModuleHook | None
    groups: Sequence[tuple[Sequence[int], ModuleHook]]

    def __call__(self, args: tuple[Any, ...], output: Any, context: RowContext | None) -> Any:
        """Return the changed output of the module."""
        context = _known(context)
        batch = len(context.prompt_end)
        copies, rest = divmod(batch, self.rows)
        if rest:
            raise UnsupportedUseError(
                f"edits were given for {self.rows} rows, and the model was called with {batch}; "
                "give one edit, or None, for each row"
            )
        y = first_tensor(output)
        x, plain = as_rows(args[0], batch), as_rows(y, batch)
        new = plain
        if self.shared is not None:
            new = as_rows(first_tensor(self.shared(args, y, context)), batch)
        for rows, hook in self.groups:
            # Beams of a row, and several answers to it, stand side by side.
            at = torch.tensor([row * copies + i for row in rows for i in range(copies)])
            at = at.to(y.device)
            own = hook((x[at],), plain[at], context.part(rows[0], at.to(context.prompt_end.device)))
            new = new.index_copy(0, at, own)
        return with_first(output, new.reshape(y.shape))


def _known(context: RowContext | None) -> RowContext:
    if context is None:
        raise UnsupportedUseError(
            "a part of the model was called by itself while edits are applied that must know its "
            "rows and where prompts end; call the whole model, or roll those edits back"
        )
    return context
