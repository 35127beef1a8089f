"""Reading and changing what flows through a module, for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kedit_lightning.edits.modules import first_tensor, with_first


@dataclass
class Capture:
    """What modules received and returned in the last forward pass, by module name.

    Args:
        inputs: Shape ``[batch, tokens, d_in]`` each.
        outputs: Shape ``[batch, tokens, d_out]`` each.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class _Stopped(Exception):  # noqa: N818 - no error: it ends a forward pass that has done its work
    """Raised inside a forward pass once the last wanted module has run."""


@contextmanager
def capture(model: nn.Module, names: Sequence[str]) -> Iterator[Capture]:
    """Record inputs and outputs of modules; a repeated call overwrites what it recorded before.

    The tensors keep their autograd history.  Open it after edits are applied, so that outputs are
    those of the edited model.
    """
    seen = Capture()

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.inputs[name] = args[0]
            seen.outputs[name] = first_tensor(output)

        return record

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stop_after(model: nn.Module, name: str) -> Iterator[None]:
    """End the forward pass run inside as soon as a module has run; nothing above it is computed.

    The statement that runs the model is left at that point, so it must be the last in the block.
    """

    def halt(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Stopped

    handle = model.get_submodule(name).register_forward_hook(halt)
    try:
        yield
    except _Stopped:
        pass
    finally:
        handle.remove()


@contextmanager
def change_output(
    model: nn.Module, name: str, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Pass the output of a module, ``[batch, tokens, d_out]``, through a function."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return with_first(output, change(first_tensor(output)))

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def add_at(output: Tensor, columns: Tensor, vectors: Tensor) -> Tensor:
    """Add a vector to one column of each row.

    Args:
        output: Shape ``[batch, tokens, hidden]``.
        columns: Shape ``[batch]``.
        vectors: Shape ``[batch, hidden]``.
    """
    at = torch.zeros(output.shape[:2], dtype=output.dtype, device=output.device)
    at[torch.arange(len(output), device=output.device), columns.to(output.device)] = 1
    return output + at[..., None] * vectors.to(output)[:, None]


@contextmanager
def zero_leaves(
    model: nn.Module, names: Sequence[str]
) -> Iterator[tuple[Capture, dict[str, Tensor]]]:
    """Add a zero that requires grad to the outputs of modules.

    Gradients with respect to these zeros are the gradients with respect to the outputs, and no
    weight gradient is ever built.  Gives the capture and the zeros by module name.
    """
    leaves: dict[str, Tensor] = {}
    seen = Capture()

    def hook(name: str) -> Callable[..., Any]:
        def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            y = first_tensor(output)
            leaves[name] = torch.zeros_like(y, requires_grad=True)
            seen.inputs[name], seen.outputs[name] = args[0].detach(), y
            return with_first(output, y + leaves[name])

        return add

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    try:
        yield seen, leaves
    finally:
        for handle in handles:
            handle.remove()
