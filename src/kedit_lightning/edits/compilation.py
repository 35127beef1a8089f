"""Models that ``torch.compile`` has compiled."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import CodeType
from typing import Any

import torch
from torch import nn


def plain_model(model: Any) -> Any:
    """The model itself, or the one inside what ``torch.compile(model)`` returned."""
    inner = getattr(model, "_orig_mod", None)
    if inner is None:
        return model
    warnings.warn(
        "the base model is the plain model inside torch.compile(model), so that its modules keep "
        "their names; call base.model.compile() to run it compiled",
        stacklevel=3,
    )
    return inner


def forget_compiled_code(model: nn.Module) -> None:
    """Drop compiled code if there is any of the model: it would go on without new hooks."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    # Blocks share their code.  Unless torch looks at hooks before it runs what it compiled, a block
    # with a hook runs what was compiled for one without, as soon as an edit breaks the graph.
    dynamo.config.skip_nnmodule_hook_guards = False
    if any(map(dynamo.eval_frame._debug_get_cache_entry_list, _codes(model))):
        torch.compiler.reset()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, models run uncompiled.

    What attaches hooks, takes them off and attaches others would compile anew each time.
    """
    compiling = "torch._dynamo" in sys.modules
    stance: Any = torch.compiler.set_stance("force_eager") if compiling else nullcontext()
    with stance:
        yield


@contextmanager
def eager_gradients() -> Iterator[None]:
    """Inside, gradients are computed, and nothing is compiled."""
    with uncompiled(), torch.inference_mode(False), torch.enable_grad():
        yield


def _codes(model: nn.Module) -> set[CodeType]:
    """Code that runs when the model is called; ``torch.compile`` attaches to it what it makes."""
    forwards = {type(module).forward for module in model.modules()}
    functions = [nn.Module._call_impl, nn.Module._wrapped_call_impl, *forwards]
    return {f.__code__ for g in functions for f in (g, inspect.unwrap(g)) if inspect.isfunction(f)}
