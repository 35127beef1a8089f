"""Changes of a model that are not ours and leave its weights alone."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

#: Packages whose hooks and forward functions place and record what a model computes.
_HARMLESS = frozenset(
    {"accelerate", "bitsandbytes", "kedit_lightning", "lightning", "peft", "torch", "transformers"}
)


def foreign_hooks(model: nn.Module) -> list[str]:
    """Names of modules with forward hooks, or a forward function of their own, by others.

    They may change answers, and no fingerprint knows what they do.
    """
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if any(
            package_of(function) not in _HARMLESS
            for function in (
                *module._forward_hooks.values(),
                *module._forward_pre_hooks.values(),
                *filter(None, [vars(module).get("forward")]),
            )
        )
    ]


def package_of(function: Any) -> str:
    """The package that a hook comes from."""
    while isinstance(function, partial):
        function = function.func
    return str(function.__module__).partition(".")[0]
