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
from torch.nn.utils.rnn import pad_sequence

from kedit_lightning.edits.projections import (
    as_rows,
    compute_dtype,
    first_tensor,
    projection_shape,
    with_first,
)
from kedit_lightning.edits.row_context import RowContext, copies_of_rows
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

    def change(self, x: Tensor) -> Tensor:
        """What is added to an output. Shape ``[..., d_out]`` from ``[..., d_in]``, in x's dtype."""
        parts = []
        if self.a is not None and self.b is not None:
            parts.append((x @ self.a.to(x.dtype).T) @ self.b.to(x.dtype).T)
        if self.delta is not None:
            parts.append(x @ self.delta.to(x.dtype).T)
        if self.bias is not None:
            parts.append(self.bias.to(x.dtype).expand(*x.shape[:-1], -1))
        return reduce(torch.add, parts)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the change to ``y`` of shape ``[..., d_out]``, in at least float32."""
        dtype = compute_dtype(y.dtype)
        return (y.to(dtype) + self.change(x.to(dtype))).to(y.dtype)


@dataclass(frozen=True)
class FactorStack:
    """Low-rank parts of several edits, for rows that carry one of them each.

    Ranks are padded with zeros, which change nothing, so that one batched product does for all
    rows what would else be two small products an edit.

    Args:
        a: Shape ``[edits, rank, d_in]``.
        b: Shape ``[edits, rank, d_out]``.
        index: The edit of each row. Shape ``[rows]``.
    """

    a: Tensor
    b: Tensor
    index: Tensor

    @classmethod
    def of(cls, groups: Sequence[tuple[Sequence[int], WeightSum]]) -> FactorStack:
        """Stack the parts of groups of rows; row ``i`` is the ``i``-th of all their rows."""
        a = _padded([weights.a for _, weights in groups if weights.a is not None])
        b = _padded([weights.b.T for _, weights in groups if weights.b is not None])
        counts = torch.tensor([len(rows) for rows, _ in groups])
        return cls(a, b, torch.arange(len(groups)).repeat_interleave(counts).to(a.device))

    def change(self, x: Tensor) -> Tensor:
        """What is added to an output. Shape ``[rows, tokens, d_out]``; copies stand in a row."""
        # Copies of a row read as more of its tokens.  The factors are gathered at each call: held
        # for each row they would take many times the memory of the edits.
        flat = x.reshape(len(self.index), -1, x.shape[-1])
        hidden = flat @ self.a[self.index].to(x.dtype).mT
        change = hidden @ self.b[self.index].to(x.dtype)
        return change.reshape(*x.shape[:-1], -1)


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return pad_sequence([tensor.to(dtype) for tensor in tensors], batch_first=True)


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


def _weights(patches: Sequence[Patch], module: nn.Module) -> WeightSum | None:
    weights = [p for p in patches if isinstance(p, (LowRankPatch, DensePatch))]
    return sum_weights(weights, module) if weights else None


def _memories(patches: Sequence[Patch]) -> list[RowFunction]:
    families: dict[Hashable, list[MemoryPatch]] = {}
    for patch in patches:
        if isinstance(patch, MemoryPatch):
            families.setdefault(patch.family, []).append(patch)
    return [group[0].build([patch.content for patch in group]) for group in families.values()]


class ModuleHook:
    """The forward hook of one edited module."""

    def __init__(self, module: nn.Module, patches: Sequence[Patch]) -> None:
        self.weights = _weights(patches, module)
        self.memories = _memories(patches)

    def __call__(self, args: tuple[Any, ...], output: Any, context: RowContext | None) -> Any:
        """Return the changed output of the module."""
        x, y = args[0], first_tensor(output)
        if self.weights is not None:
            y = self.weights(x, y)
        if self.memories:
            context = known_context(context)
            rows = len(context.prompt_end)
            x, shape, y = as_rows(x, rows), y.shape, as_rows(y, rows)
            for memory in self.memories:
                y = memory(x, y, context)
            y = y.reshape(shape)
        return with_first(output, y)


class RowsHook:
    """The forward hook of a module whose rows carry different edits.

    The weight patches that a row carries add to those that all rows share.  Its memories act
    together with the shared ones, as families span both.

    Args:
        module: The module.
        rows: Number of rows that edits were given for.
        shared: What is done to all rows.
        own: Rows, and what is done to them beside.
    """

    def __init__(
        self,
        module: nn.Module,
        rows: int,
        shared: Sequence[Patch],
        own: Sequence[tuple[Sequence[int], Sequence[Patch]]],
    ) -> None:
        self._rows = rows
        self._shared = _weights(shared, module)
        self._memories = _memories(shared)
        device = next((parameter.device for parameter in module.parameters()), None)

        def place(rows: Sequence[int]) -> Tensor:
            return torch.tensor(rows, device=device)

        #: Rows, and the weights they carry.
        self._own: list[tuple[Tensor, WeightSum | FactorStack]] = []
        #: Rows, the key of their context, and their memories.
        self._own_memories: list[tuple[Tensor, int, list[RowFunction]]] = []
        low: list[tuple[Sequence[int], WeightSum]] = []
        for at, patches in own:
            weights = _weights(patches, module)
            if weights is not None and weights.delta is None and weights.bias is None:
                low.append((at, weights))
            elif weights is not None:
                self._own.append((place(at), weights))
            if any(isinstance(patch, MemoryPatch) for patch in patches):
                functions = _memories([*shared, *patches])
                self._own_memories.append((place(at), at[0], functions))
        if low:
            rows_of_low = [row for at, _ in low for row in at]
            self._own.append((place(rows_of_low), FactorStack.of(low)))
        self._remembers = bool(self._memories or self._own_memories)

    def __call__(self, args: tuple[Any, ...], output: Any, context: RowContext | None) -> Any:
        """Return the changed output of the module."""
        if context is None and args[0].dim() == 3 and not self._remembers:
            batch = len(args[0])  # an encoder, which generation runs before the model itself
        else:
            context = known_context(context)
            batch = len(context.prompt_end)
        copies = copies_of_rows(batch, self._rows)
        y = first_tensor(output)
        x, plain = as_rows(args[0], batch), self._weighed(args[0], y, batch, copies)
        new = plain
        if context is None:  # there is no memory
            return with_first(output, new.reshape(y.shape))
        for memory in self._memories:
            new = memory(x, new, context)
        for rows, key, memories in self._own_memories:
            at = _spread(rows, copies, y.device)
            part = context.part(key, at.to(context.prompt_end.device))
            own = plain[at]
            for memory in memories:
                own = memory(x[at], own, part)
            new = new.index_copy(0, at, own)
        return with_first(output, new.reshape(y.shape))

    def _weighed(self, x: Tensor, y: Tensor, batch: int, copies: int) -> Tensor:
        """Output rows ``[batch, tokens, d_out]`` under the weight patches, shared and own."""
        if self._shared is None and not self._own:
            return as_rows(y, batch)
        dtype = compute_dtype(y.dtype)
        total = y.to(dtype)
        if self._shared is not None:
            total = total + self._shared.change(x.to(dtype))
        total = as_rows(total, batch)
        for rows, weights in self._own:
            at = _spread(rows, copies, y.device)
            total = total.index_add(0, at, weights.change(as_rows(x, batch)[at].to(dtype)))
        return total.to(y.dtype)


def _spread(rows: Tensor, copies: int, device: torch.device) -> Tensor:
    """Places of rows where beams of a row, and several answers to it, stand side by side."""
    rows = rows.to(device)
    return (rows[:, None] * copies + torch.arange(copies, device=device)).flatten()


def known_context(context: RowContext | None) -> RowContext:
    """The context of the call that runs now.

    Raises:
        UnsupportedUseError: A part of the model was called by itself.
    """
    if context is None:
        raise UnsupportedUseError(
            "a part of the model was called by itself while edits are applied that must know its "
            "rows and where prompts end; call the whole model, or roll those edits back"
        )
    return context
