"""Adapters that peft has put into a model: which are in force, and what is beside them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from kedit_lightning.edits.projections import base_layer
from kedit_lightning.errors import UnsupportedUseError


def model_inside(model: Any) -> Any:
    """The model itself, or the one of transformers inside a ``PeftModel``, adapters in force.

    Raises:
        UnsupportedUseError: An adapter acts outside of that model.
    """
    peft: Any = sys.modules.get("peft")
    wrapped = peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))
    for name, config in dict(getattr(model, "peft_config", None) or {}).items():
        outside = getattr(config, "is_prompt_learning", False)
        if outside or getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedUseError(
                f"adapter '{name}' of type {config.peft_type.value} acts in the call of its "
                "PeftModel, through virtual tokens or behind invocation tokens, and edits act "
                "inside the model; edit the model without it, or one that has a LoRA adapter"
            )
    if not wrapped:
        return model
    # Most ask this model what they are asked, so that edits act there as well.
    if isinstance(model.base_model, peft.AdaLoraModel):
        warnings.warn(
            "the PeftModel of an AdaLoRA adapter runs the forward function of its model, past "
            "edits that act on prompts, rows or logits; call base.model instead",
            stacklevel=3,
        )
    return model.get_base_model()


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and layers of the modules around which peft has put adapters, outer ones first."""
    for name, module in model.named_modules():
        if base_layer(module) is not module:
            yield name, module


def _in_force(layer: Any) -> list[str]:
    """Names of the adapters that act in a layer."""
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        return []
    active = getattr(layer, "active_adapters", ())
    return [active] if isinstance(active, str) else list(active)


def adapters_in_force(model: nn.Module) -> dict[str, dict[str, float]]:
    """Scales of the adapters that act, by module and adapter; nothing for a model without any.

    The modules have the names that they have without adapters.
    """
    found = {}
    for name, layer in adapted_modules(model):
        scales = getattr(layer, "scaling", {})
        if acting := {key: float(scales.get(key, 1)) for key in _in_force(layer)}:
            found[_plain(name)] = acting
    return found


def tensors_in_force(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without adapters that do not act, under names as without adapters."""
    state: dict[str, Tensor] = model.state_dict()
    for name, layer in adapted_modules(model):
        parts = (
            *getattr(layer, "adapter_layer_names", ()),
            *getattr(layer, "other_param_names", ()),
        )
        acting = _in_force(layer)
        for part in parts:
            prefix = f"{name}.{part}." if name else f"{part}."
            for key in [key for key in state if key.startswith(prefix)]:
                if key.removeprefix(prefix).split(".")[0] not in acting:
                    del state[key]
    return {_plain(key): tensor for key, tensor in state.items()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "base_layer")


def refuse_adapted(model: nn.Module, action: str) -> None:
    """Refuse to write weights under names that a model without adapters does not have.

    Raises:
        UnsupportedUseError: The model has adapters.
    """
    for name, _ in adapted_modules(model):
        raise UnsupportedUseError(
            f"{action} cannot write this model: adapters of peft stand around its modules, "
            f"'{name}' among them, and transformers would save them apart; merge them first "
            "(merge_and_unload), which keeps edits of weights, or save the edits with edit.save"
        )
