"""The effects that an edit can have on a base model.

Effects of one ``family`` act as one: ``build`` of the first turns the contents of all of them,
oldest first, into a function.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.low_rank import LowRankDelta
from kedit_lightning.edits.projections import compute_dtype, oriented, projection_shape
from kedit_lightning.edits.row_context import RowContext
from kedit_lightning.edits.weight_storage import device_of


def _present_sum(parts: Iterable[Tensor | None]) -> Tensor | None:
    """Sum of those that are there, if any is."""
    present = [part for part in parts if part is not None]
    return reduce(torch.add, present) if present else None


@dataclass(frozen=True)
class WeightDelta:
    """Change of a projection: low-rank, dense ``[d_out, d_in]`` and bias ``[d_out]``."""

    low_rank: LowRankDelta | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None

    @property
    def only_low_rank(self) -> LowRankDelta | None:
        """The factors if there is no other part, else ``None``."""
        return self.low_rank if self.dense is None and self.bias is None else None

    def change(self, x: Tensor) -> Tensor:
        """What is added to the output, ``[..., d_out]``, in the dtype of ``x``, ``[..., d_in]``."""
        parts = [] if self.low_rank is None else [self.low_rank.change(x)]
        if self.dense is not None:
            parts.append(x @ self.dense.to(x.dtype).T)
        if self.bias is not None:
            parts.append(self.bias.to(x.dtype).expand(*x.shape[:-1], -1))
        return reduce(torch.add, parts)

    def plus(self, other: WeightDelta) -> WeightDelta:
        """Both changes together."""
        factors = [delta.low_rank for delta in (self, other) if delta.low_rank is not None]
        return WeightDelta(
            LowRankDelta.sum(factors) if factors else None,
            _present_sum([self.dense, other.dense]),
            _present_sum([self.bias, other.bias]),
        )

    def matrix(self, like: Tensor | None = None) -> Tensor | None:
        """The change of the matrix, dense; ``None`` without one. Shape ``[d_out, d_in]``.

        Args:
            like: A tensor in whose dtype, and on whose device, it is computed; by default its own.
        """
        dense, low_rank = self.dense, self.low_rank
        if like is not None:
            dense = None if dense is None else dense.to(like)
            if low_rank is not None:
                low_rank = LowRankDelta(low_rank.a.to(like), low_rank.b.to(like))
        return _present_sum([None if low_rank is None else low_rank.dense, dense])

    def of_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Change of the parameters that hold the module, dense and in their own orientation.

        Their names begin where the module's own, or that of the holder of experts, ends.
        """
        dense = self.matrix()
        if isinstance(module, ExpertProjection):
            return module.of_parameters(dense, self.bias)
        weight = None if dense is None else oriented(dense, module)
        parts = {"weight": weight, "bias": self.bias}
        return {name: part for name, part in parts.items() if part is not None}

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the change to ``y`` of shape ``[..., d_out]``, in at least float32."""
        dtype = compute_dtype(y.dtype)
        return (y.to(dtype) + self.change(x.to(dtype))).to(y.dtype)


@dataclass(frozen=True)
class Places:
    """Rows and columns of a call's logits, ``[n]`` each; hidden states there, ``[n, hidden]``."""

    rows: Tensor
    columns: Tensor
    states: Mapping[str, Tensor]


#: A module's input ``[batch, tokens, d_in]``, its output and the row context -> the new output.
RowFunction: TypeAlias = Callable[[Tensor, Tensor, RowContext], Tensor]
#: A module's output ``[batch, tokens, hidden]`` and the row context, into which it writes.
StatesFunction: TypeAlias = Callable[[Tensor, RowContext], None]
#: Logits ``[n, vocab]``, their places and the row context -> new logits, or the same tensor.
LogitsFunction: TypeAlias = Callable[[Tensor, Places, RowContext], Tensor]
#: A prompt, whether a text leaves room for an answer, and where it has pictures their hashes -> the
#: new prompt.
PromptFunction: TypeAlias = Callable[..., str]


@dataclass(frozen=True)
class AddToOutput:
    """Adds a change of the weight and the bias to a projection's output."""

    module: str
    delta: WeightDelta


@dataclass(frozen=True)
class RouteRows:
    """Changes a module's output, row by row; ``build`` gets the contents of one module.

    That of one edit has one content, that of many folded into one those of all, oldest first.
    One that ``spares_heads`` looks at the last token of each prompt, and changes no earlier one.
    """

    module: str
    family: Hashable
    build: Callable[[Sequence[Any]], RowFunction]
    contents: Sequence[Any]
    spares_heads: bool = False


@dataclass(frozen=True)
class ReadStates:
    """Reads a module's output, after all changes of it, into the row context.

    ``build`` is also told which rows carry which content, ``[rows, contents]``; ``None`` if all do.
    """

    module: str
    family: Hashable
    build: Callable[[Sequence[Any], Tensor | None], StatesFunction]
    content: Any


@dataclass(frozen=True)
class ChangeLogits:
    """Changes logits, given the output of the modules in ``reads`` at the places of the logits."""

    family: Hashable
    build: Callable[[Sequence[Any]], LogitsFunction]
    content: Any
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class RewritePrompt:
    """Rewrites prompts before they are tokenised."""

    family: Hashable
    build: Callable[[Sequence[Any]], PromptFunction]
    content: Any


@dataclass(frozen=True)
class KeepMemory:
    """Keeps tensors that later edits of the same method read; the model does not change.

    An edit with this effect was computed from the memories below it, so it requires its stack.
    """

    method: str
    tensors: dict[str, Tensor]


Effect: TypeAlias = AddToOutput | RouteRows | ReadStates | ChangeLogits | RewritePrompt | KeepMemory
E = TypeVar("E", AddToOutput, RouteRows, ReadStates, ChangeLogits, RewritePrompt, KeepMemory)
F = TypeVar("F", RouteRows, ReadStates, ChangeLogits, RewritePrompt)


def of_type(effects: Iterable[Effect], kind: type[E]) -> list[E]:
    """The effects of one type, in their order."""
    return [effect for effect in effects if isinstance(effect, kind)]


def families(effects: Iterable[Effect], kind: type[F]) -> list[list[F]]:
    """The effects of one type, grouped by family; families in the order of their first member."""
    groups: dict[Hashable, list[F]] = {}
    for effect in effects:
        if isinstance(effect, kind):
            groups.setdefault(effect.family, []).append(effect)
    return list(groups.values())


def contents_of(routes: Iterable[RouteRows]) -> list[Any]:
    """Contents of effects of one family on one module, oldest first."""
    return list(chain.from_iterable(route.contents for route in routes))


def sum_deltas(deltas: Sequence[WeightDelta], module: nn.Module) -> WeightDelta | None:
    """Sum changes of a projection on its device; low-rank parts stay factors while that is cheaper.

    The result is a pure function of the ordered changes, so rolling back and re-applying edits
    gives the same numbers.  It is ``None`` without changes.
    """
    if not deltas:
        return None
    device = device_of(module)
    factors = [delta.low_rank.to(device) for delta in deltas if delta.low_rank is not None]
    low_rank = LowRankDelta.sum(factors) if factors else None
    dense = _sum([delta.dense for delta in deltas if delta.dense is not None], device)
    d_in, d_out = projection_shape(module)
    if low_rank is not None and low_rank.rank * (d_in + d_out) > d_in * d_out:
        folded = low_rank.to(compute_dtype(low_rank.a.dtype)).dense
        dense, low_rank = folded if dense is None else dense + folded, None
    bias = _sum([delta.bias for delta in deltas if delta.bias is not None], device)
    return WeightDelta(low_rank, dense, bias)


def _sum(tensors: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """Sum in at least float32, without copies of all terms; a single term is not copied."""
    moved = (tensor.to(device) for tensor in tensors)
    return reduce(lambda x, y: x.to(compute_dtype(x.dtype)) + y, moved) if tensors else None
