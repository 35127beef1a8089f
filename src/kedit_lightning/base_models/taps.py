"""Forward hooks that read and change inputs and outputs of modules inside a ``with`` block.

They see ``[batch, tokens, width]``, whatever the module's own form is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kedit_lightning.edits.compilation import uncompiled
from kedit_lightning.edits.effects import WeightDelta
from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.experts import routed_experts
from kedit_lightning.edits.projections import (
    as_rows,
    batch_size,
    expert_projection,
    find_module,
    first_tensor,
    with_first,
)
from kedit_lightning.edits.routed_hooks import ExpertsHook
from kedit_lightning.errors import UnsupportedUseError

#: Takes the input and the output of a module; returns its new output, or ``None`` to leave it.
Visit: TypeAlias = Callable[[Tensor, Tensor], Tensor | None]


@dataclass
class Capture:
    """Inputs and outputs of modules, ``[batch, tokens, width]``, in the last forward pass."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class _Stopped(Exception):  # noqa: N818 - no error: it ends a forward pass early
    """Raised inside a forward pass once the last wanted module has run."""


@contextmanager
def _called(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Give a function that returns the number of rows of the model's current call."""
    batch = 1

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal batch
        batch = batch_size(args, kwargs)

    handle = model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with uncompiled():
            yield lambda: batch
    finally:
        handle.remove()


@contextmanager
def visiting(model: nn.Module, visits: Mapping[str, Visit]) -> Iterator[None]:
    """Call functions on inputs and outputs of modules when the model runs inside the block.

    Args:
        model: The model.
        visits: A function for each module name. Its tensors have shape ``[batch, tokens, width]``;
            outputs are those after the edits that are applied. For a projection of experts they are
            its keys times the router's weights, and the output of all experts of the block.
    """

    def call(visit: Visit, experts: ExpertProjection | None, module: nn.Module, *seen: Any) -> Any:
        args, kwargs, output = seen
        x = args[0] if args else kwargs["hidden_states"]
        x, y = x if experts is None else experts.gated_keys(args), first_tensor(output)
        new = visit(as_rows(x, batch()), as_rows(y, batch()))
        return None if new is None else with_first(output, new.reshape(y.shape))

    with _called(model) as batch, ExitStack() as hooks:
        for name, visit in visits.items():
            experts = expert_projection(model, name)
            module = model.get_submodule(name if experts is None else experts.owner)
            hook = partial(call, visit, experts)
            handle = module.register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


@contextmanager
def changing(model: nn.Module, deltas: Mapping[str, WeightDelta]) -> Iterator[None]:
    """Add changes of projections, single experts among them, to what they write."""
    experts: dict[str, dict[int, WeightDelta]] = {}
    plain: dict[str, Visit] = {}
    for name, delta in deltas.items():
        module = find_module(model, name)
        if isinstance(module, ExpertProjection) and module.expert is not None:
            experts.setdefault(module.owner, {})[module.expert] = delta
        else:
            plain[name] = delta

    def act(hook: ExpertsHook, module: nn.Module, args: Any, output: Any) -> Any:
        return hook(args, output, None)

    with visiting(model, plain), ExitStack() as hooks:
        for owner, of_experts in experts.items():
            module = find_module(model, owner)
            held = routed_experts(module)
            assert held is not None
            handle = module.register_forward_hook(partial(act, ExpertsHook(held, of_experts)))
            hooks.callback(handle.remove)
        yield


@contextmanager
def change_inputs(
    model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Pass the inputs of modules, ``[batch, tokens, d_in]`` each, through functions."""

    def call(change: Callable[[Tensor], Tensor], module: nn.Module, args: Any) -> Any:
        return (change(as_rows(args[0], batch())).reshape(args[0].shape), *args[1:])

    with _called(model) as batch, ExitStack() as hooks:
        for name, change in changes.items():
            handle = model.get_submodule(name).register_forward_pre_hook(partial(call, change))
            hooks.callback(handle.remove)
        yield


@contextmanager
def capture(model: nn.Module, names: Sequence[str]) -> Iterator[Capture]:
    """Record inputs and outputs of modules; a further forward pass overwrites them.

    The tensors keep their autograd history.  Open it after edits are applied, so that outputs are
    those of the edited model.
    """
    seen = Capture()

    def record(name: str, x: Tensor, y: Tensor) -> None:
        seen.inputs[name], seen.outputs[name] = x, y

    with visiting(model, {name: partial(record, name) for name in names}):
        yield seen


@contextmanager
def stop_after(model: nn.Module, name: str) -> Iterator[None]:
    """End the forward pass as soon as a module has run; nothing above it is computed.

    The statement that runs the model is left at that point, so it must be the last in the block.
    Open it after the taps on the module: hooks run in the order in which they were added.
    """

    def halt(x: Tensor, y: Tensor) -> None:
        raise _Stopped

    experts = expert_projection(model, name)
    with suppress(_Stopped), visiting(model, {experts.owner if experts else name: halt}):
        yield


@contextmanager
def gathering(head: nn.Module, places: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Inside, the next call of a vocabulary projection reads these rows and columns, ``[n]`` each.

    Its input ``[batch, tokens, width]`` becomes ``[1, n, width]``.
    """

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        handle.remove()  # an edit that changes logits may call the head once more
        hidden = first_tensor(args)
        if hidden.dim() != 3:
            raise UnsupportedUseError(
                f"the vocabulary projection of this model reads {hidden.dim() - 2} indices besides "
                "row and width, as one that predicts several tokens at once does; use a decoder "
                "that predicts one token at a time"
            )
        at = tuple(index.to(hidden.device) for index in places)
        return (hidden[at][None], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def skipping(model: nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Replace forward passes of modules by stored outputs, in the module's own form."""
    with ExitStack() as kept:
        for name, output in outputs.items():
            stored = partial(_given, output)
            kept.enter_context(_forward(model.get_submodule(name), stored))
        yield


def _given(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


@dataclass
class Call:
    """A call of a module.

    Args:
        start: When it began, counted in calls.
        end: When it ended, counted in the same way.
        output: What it has given, in its own form, before hooks act on it.
        batch: Rows of the model's call.
    """

    start: int
    end: int = sys.maxsize
    output: Any = None
    batch: int = 0

    @property
    def has_rows(self) -> bool:
        """Whether it gives one tensor with an entry a row."""
        first, *rest = self.output if isinstance(self.output, tuple) else (self.output,)
        ours = isinstance(first, Tensor) and first.dim() > 2 and len(first) == self.batch
        return ours and all(value is None for value in rest)


@contextmanager
def noting_calls(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Call]]]:
    """Note the calls of modules inside the block, by name."""
    calls: dict[str, list[Call]] = {}
    clock = count()

    def noted(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = Call(next(clock), batch=batch())
        calls.setdefault(name, []).append(call)
        call.output = forward(*args, **kwargs)
        call.end = next(clock)
        return call.output

    modules = {name: model.get_submodule(name) for name in names}
    with _called(model) as batch, ExitStack() as kept:
        for name, module in modules.items():
            kept.enter_context(_forward(module, partial(noted, name, module.forward)))
        yield calls


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module has another forward function."""
    own = vars(module).get("forward")
    setattr(module, "forward", forward)  # noqa: B010
    try:
        yield
    finally:
        if own is None:
            vars(module).pop("forward", None)
        else:
            setattr(module, "forward", own)  # noqa: B010


@contextmanager
def change_output(
    model: nn.Module, name: str, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Pass the output of a module, ``[batch, tokens, d_out]``, through a function."""
    with visiting(model, {name: lambda x, y: change(y)}):
        yield


def add_at(output: Tensor, columns: Tensor, vectors: Tensor) -> Tensor:
    """Add vectors ``[batch, hidden]`` at columns ``[batch]`` of ``[batch, tokens, hidden]``."""
    at = torch.zeros(output.shape[:2], dtype=output.dtype, device=output.device)
    at[torch.arange(len(output), device=output.device), columns.to(output.device)] = 1
    return output + at[..., None] * vectors.to(output)[:, None]


@contextmanager
def zero_leaves(
    model: nn.Module, names: Sequence[str]
) -> Iterator[tuple[Capture, dict[str, Tensor]]]:
    """Add a zero that requires grad to the outputs of modules.

    Gradients with respect to these zeros are those with respect to the outputs, and no weight
    gradient is built.  Gives the capture, and the zeros ``[batch, tokens, d_out]`` by module name.
    """
    leaves: dict[str, Tensor] = {}
    seen = Capture()

    def add(name: str, x: Tensor, y: Tensor) -> Tensor:
        leaf = leaves.get(name)
        # Gradient checkpointing runs a block again in the backward pass: the zero of the first run
        # gets the gradient.
        if leaf is None or leaf.grad is not None or leaf.shape != y.shape:
            leaf = leaves[name] = torch.zeros_like(y, requires_grad=True)
        seen.inputs[name], seen.outputs[name] = x.detach(), y
        return y + leaf

    with visiting(model, {name: partial(add, name) for name in names}):
        yield seen, leaves
