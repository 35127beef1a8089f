"""Forward hooks that apply effects: one on each changed module, and one on the logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from kedit_lightning.edits.effects import (
    AddToOutput,
    ChangeLogits,
    Effect,
    LogitsFunction,
    Places,
    RouteRows,
    RowFunction,
    StatesFunction,
    WeightDelta,
    contents_of,
    families,
    of_type,
    sum_deltas,
)
from kedit_lightning.edits.low_rank import LowRankBatch, LowRankDelta
from kedit_lightning.edits.projections import as_rows, compute_dtype, first_tensor, with_first
from kedit_lightning.edits.row_context import RowContext, copies_of_rows
from kedit_lightning.edits.weight_storage import device_of
from kedit_lightning.errors import UnsupportedUseError

#: Arguments and output of a module, and the row context -> its new output; ``None`` leaves it.
ForwardHook: TypeAlias = Callable[[tuple[Any, ...], Any, RowContext | None], Any]


def known_context(context: RowContext | None) -> RowContext:
    """The context of the current call; refused if a part of the model was called by itself."""
    if context is None:
        raise UnsupportedUseError(
            "a part of the model was called by itself while edits are applied that must know its "
            "rows and where prompts end; call the whole model, or roll those edits back"
        )
    return context


def _delta(effects: Sequence[Effect], module: nn.Module) -> WeightDelta | None:
    return sum_deltas([effect.delta for effect in of_type(effects, AddToOutput)], module)


def _row_functions(effects: Sequence[Effect]) -> list[RowFunction]:
    groups = families(effects, RouteRows)
    return [group[0].build(contents_of(group)) for group in groups]


class ModuleHook:
    """Changes the output of a module: changes of weights add up, then row functions act in order.

    The row functions of carried effects are built together with the shared ones, as families span
    both.

    Args:
        module: The module.
        shared: Effects on all rows, oldest first.
        carried: Rows, and the effects that only they carry.
        rows: Number of rows that the carried effects were given for.
    """

    def __init__(
        self,
        module: nn.Module,
        shared: Sequence[Effect],
        carried: Sequence[tuple[Sequence[int], Sequence[Effect]]] = (),
        rows: int = 0,
    ) -> None:
        self._rows = rows
        self.delta = _delta(shared, module)
        self._functions = _row_functions(shared)
        device = device_of(module)
        #: Rows, and the change of weights that they carry.
        self._carried: list[tuple[Tensor, WeightDelta | LowRankBatch]] = []
        #: Rows, the key of their context, and their row functions.
        self._carried_functions: list[tuple[Tensor, int, list[RowFunction]]] = []
        low: list[tuple[Sequence[int], LowRankDelta]] = []
        for at, effects in carried:
            index, delta = torch.tensor(at, device=device), _delta(effects, module)
            if delta is not None and delta.only_low_rank is not None:
                low.append((at, delta.only_low_rank))
            elif delta is not None:
                self._carried.append((index, delta))
            if of_type(effects, RouteRows):
                functions = _row_functions([*shared, *effects])
                self._carried_functions.append((index, at[0], functions))
        if low:
            rows_of_low = torch.tensor([row for at, _ in low for row in at], device=device)
            self._carried.append((rows_of_low, LowRankBatch.of(low)))
        #: Whether it looks at rows, rather than change weights alone.
        self.routes = bool(self._functions or self._carried_functions)

    def __call__(self, args: tuple[Any, ...], output: Any, context: RowContext | None) -> Any:
        """Return the changed output of the module."""
        x, y = first_tensor(args), first_tensor(output)
        if not self._rows and not self.routes:
            return with_first(output, y if self.delta is None else self.delta(x, y))
        if context is None and x.dim() == 3 and not self.routes:
            batch = len(x)  # an encoder, which generation runs before the model itself
        else:
            context = known_context(context)
            batch = len(context.prompt_end)
        copies = copies_of_rows(batch, self._rows or batch)
        new = weighted = self._weighted(x, y, batch, copies)
        x = as_rows(x, batch)
        for function in self._functions:
            new = function(x, new, known_context(context))
        for rows, key, functions in self._carried_functions:
            at, context = _copied(rows, copies, y.device), known_context(context)
            part = context.part(key, at.to(context.prompt_end.device))
            routed = weighted[at]
            for function in functions:
                routed = function(x[at], routed, part)
            new = new.index_copy(0, at, routed)
        return with_first(output, new.reshape(y.shape))

    def _weighted(self, x: Tensor, y: Tensor, batch: int, copies: int) -> Tensor:
        """Output ``[batch, tokens, d_out]`` under the changes of weights, shared and carried."""
        if self.delta is None and not self._carried:
            return as_rows(y, batch)
        dtype = compute_dtype(y.dtype)
        total = y.to(dtype)
        if self.delta is not None:
            total = total + self.delta.change(x.to(dtype))
        total = as_rows(total, batch)
        for rows, delta in self._carried:
            at = _copied(rows, copies, y.device)
            total = total.index_add(0, at, delta.change(as_rows(x, batch)[at].to(dtype)))
        return total.to(y.dtype)


def _copied(rows: Tensor, copies: int, device: torch.device) -> Tensor:
    """Batch indices of all copies of rows: beams and several answers of a row are neighbours."""
    rows = rows.to(device)
    return (rows[:, None] * copies + torch.arange(copies, device=device)).flatten()


def read_states(read: StatesFunction, args: Any, output: Any, context: RowContext | None) -> None:
    """Forward hook, with its first argument bound: passes the output of a module to a function."""
    read(first_tensor(output), known_context(context))


class LogitsHook:
    """Changes the logits of the whole model by effects, oldest first."""

    def __init__(self, effects: Iterable[ChangeLogits]) -> None:
        self._functions: list[tuple[LogitsFunction, tuple[str, ...]]] = []
        for group in families(effects, ChangeLogits):
            reads = tuple(dict.fromkeys(name for effect in group for name in effect.reads))
            function = group[0].build([effect.content for effect in group])
            self._functions.append((function, reads))
        self._states: dict[str, Tensor] = {}

    def readers(self) -> list[tuple[str, ForwardHook]]:
        """Names of the modules whose output is needed, and hooks that keep it for this call."""

        def keep(name: str, args: Any, output: Any, context: RowContext | None) -> None:
            self._states[name] = first_tensor(output)

        names = dict.fromkeys(name for _, reads in self._functions for name in reads)
        return [(name, partial(keep, name)) for name in names]

    def __call__(self, args: tuple[Any, ...], output: Any, context: RowContext | None) -> Any:
        """Return the model's output with changed logits; refused if it holds a loss."""
        context = known_context(context)
        states, self._states = self._states, {}
        logits = output.logits
        flat = new = logits.reshape(-1, logits.shape[-1])
        rows, columns, states = _places(logits, states, context)
        for function, reads in self._functions:
            places = Places(rows, columns, {name: states[name] for name in reads})
            new = function(new, places, context)
        if new is flat:
            return None
        if getattr(output, "loss", None) is not None:
            raise UnsupportedUseError(
                "the model was asked for its loss while an edit changes its logits; compute the "
                "loss from the logits, or roll the edit back"
            )
        output["logits"] = new.reshape(logits.shape)
        return output


def _places(
    logits: Tensor, states: dict[str, Tensor], context: RowContext
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Row and column of each logit vector, ``[n]``, and hidden states there, ``[n, hidden]``."""
    hidden = {name: as_rows(state, len(context.prompt_end)) for name, state in states.items()}
    if context.logit_places is not None:
        rows, columns = context.logit_places
        at = {n: h[rows.to(h.device), columns.to(h.device)] for n, h in hidden.items()}
        return rows, columns, at
    # The model computed logits of the last columns of each row.
    batch, kept = logits.shape[:2]
    columns = torch.arange(context.columns - kept, context.columns, device=logits.device)
    rows = torch.arange(batch, device=logits.device).repeat_interleave(kept)
    last = {name: h[:, h.shape[1] - kept :].flatten(0, 1) for name, h in hidden.items()}
    return rows, columns.repeat(batch), last


class HookedStack(Protocol):
    """The part of a stack that its hooks use."""

    @property
    def active(self) -> bool:
        """Whether edits act now."""

    @property
    def context(self) -> RowContext | None:
        """The row context of the call that runs now."""

    @property
    def described(self) -> str:
        """How many edits there are, and their ids."""

    def follow_modules(self) -> None:
        """Move hooks to the modules that somebody has put in the place of hooked ones."""


class StackHook:
    """A registered forward hook, which acts while the stack that it leads to does.

    A deep copy of the model has copies of its hooks, which lead to a copy of the stack.
    """

    def __init__(self, stack: HookedStack, hook: ForwardHook) -> None:
        self.stack = stack
        self._hook = hook

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the changed output of the module, or ``None`` to leave it."""
        return self._hook(args, output, self.stack.context) if self.stack.active else None

    def __deepcopy__(self, memo: dict[int, Any]) -> StackHook:
        return StackHook(copy.deepcopy(self.stack, memo), self._hook)

    def __reduce__(self) -> Any:
        raise UnsupportedUseError(
            f"the model carries {self.stack.described}, which cannot be pickled with it; roll them "
            "back first, save them with edit.save(path), or pickle edit.materialise(), a copy with "
            "the edit in its weights"
        )


class EntryHook(StackHook):
    """A registered hook before a forward pass: the stack sees to it that its hooks still stand.

    It acts on no module itself.  Compiled code leaves it out, as modules are part of that code.
    """

    def __init__(self, stack: HookedStack) -> None:
        super().__init__(stack, lambda *call: None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        """Let the stack look at the modules."""
        if not torch.compiler.is_compiling():
            self.stack.follow_modules()

    def __deepcopy__(self, memo: dict[int, Any]) -> EntryHook:
        return EntryHook(copy.deepcopy(self.stack, memo))


def stack_hooks(model: nn.Module) -> Iterator[StackHook]:
    """All hooks of stacks of edits on a model and its parts."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, StackHook):
                yield hook


def drop_hooks(modules: Iterable[nn.Module], stack: HookedStack) -> None:
    """Take all hooks of a stack off modules, also those that came along with a copied module."""
    for module in modules:
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, StackHook) and hook.stack is stack:
                del module._forward_hooks[key]
