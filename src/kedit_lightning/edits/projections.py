"""Helpers about torch modules that edits and base models share."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kedit_lightning.edits.expert_projection import ExpertProjection, places_of_experts
from kedit_lightning.edits.experts import routed_experts
from kedit_lightning.errors import UnsupportedUseError, article_list

#: Where a module stands: the modules beside it by name, its own name, and the module.
Place: TypeAlias = tuple[Mapping[str, nn.Module | None], str, nn.Module]


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as ``[d_in, d_out]``, as GPT-2's ``Conv1D`` does."""
    # By type, as shapes cannot tell for square matrices.
    return type(base_layer(module)).__name__ == "Conv1D"


def is_projection(module: nn.Module) -> bool:
    """Whether the module maps its input by one matrix, which weight edits know how to change.

    Libraries that quantise have classes of their own, with the names of sizes that ``Linear`` has.
    """
    module = base_layer(module)
    if isinstance(module, (nn.Linear, ExpertProjection)) or is_transposed(module):
        return True
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(type(size) is int for size in sizes) and not module._modules


def projection_shape(module: nn.Module) -> tuple[int, int]:
    """``(d_in, d_out)`` of a Linear, Conv1D or expert, quantised ones included."""
    module = base_layer(module)
    if isinstance(module, ExpertProjection):
        return module.shape
    if not is_transposed(module):
        return module.in_features, module.out_features  # type: ignore[return-value]
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def oriented(matrix: Tensor, module: nn.Module) -> Tensor:
    """Turn ``[d_out, d_in]`` into the orientation of the module's own weight, and back."""
    return matrix.T if is_transposed(module) else matrix


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a module's input or output: a tensor, or a tuple that starts with it.

    Raises:
        UnsupportedUseError: It is neither, as that of a whole model.
    """
    tensor = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(tensor, Tensor):
        raise UnsupportedUseError(
            "edits act on modules that map a tensor to a tensor, and this one takes or gives "
            f"{type(tensor).__name__}; choose a projection or a block"
        )
    return tensor


def with_first(output: Any, tensor: Tensor) -> Any:
    """The same output with its hidden states replaced."""
    return (tensor, *output[1:]) if isinstance(output, (tuple, list)) else tensor


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Number of rows in a call of a language model."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"):
        if isinstance(kwargs.get(name), Tensor):
            return len(kwargs[name])
    return len(args[0])


def as_rows(tensor: Tensor, batch: int) -> Tensor:
    """A module's input or output as ``[batch, tokens, width]``: OPT's MLPs flatten the rows."""
    return tensor.reshape(batch, -1, tensor.shape[-1]) if tensor.dim() == 2 else tensor


def base_layer(module: nn.Module) -> nn.Module:
    """The module itself, or the one that peft has put an adapter around."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def projections_in(module: nn.Module) -> dict[str, nn.Module]:
    """All projections inside a module by name, without adapters that peft has put around them."""
    parts = dict(module.named_modules())
    adapted = tuple(f"{name}." for name, part in parts.items() if base_layer(part) is not part)
    return {
        name: base_layer(part)
        for name, part in parts.items()
        if name and is_projection(part) and not name.startswith(adapted)
    }


def find_module(model: nn.Module, name: str, adapted: bool = False) -> nn.Module:
    """The module called ``name``, without an adapter around it unless ``adapted`` asks for that.

    Names of a parameter that holds experts, and of one of them (``….down_proj.3``), are those of
    :class:`ExpertProjection`.

    Raises:
        UnsupportedUseError: There is none.
    """
    try:
        module = model.get_submodule(name)
        return module if adapted else base_layer(module)
    except AttributeError as error:
        found = expert_projection(model, name)
        if found is None:
            raise UnsupportedUseError(
                f"the base model has no module {name!r}; base.model.named_modules() names them all"
            ) from error
        return found


def expert_projection(model: nn.Module, name: str) -> ExpertProjection | None:
    """The projection called ``name`` if it is that of an expert, or of all experts of a block."""
    for owner, parameter, expert in places_of_experts(name):
        with suppress(AttributeError):
            experts = routed_experts(base_layer(model.get_submodule(owner)))
            known = experts is not None and experts.parameter == parameter
            if experts is not None and known and (expert is None or expert < experts.count):
                return ExpertProjection(experts, owner, expert)
    return None


def places_of(model: nn.Module, names: Iterable[str]) -> list[Place]:
    """Where modules and those around them stand: siblings by name, own name, and the module."""
    places = {}
    for name in names:
        parent = model
        for part in filter(None, name.split(".")):
            module = parent.get_submodule(part)
            places[parent, part] = (parent._modules, part, module)
            parent = module
    return list(places.values())


def have_moved(places: Iterable[Place]) -> bool:
    """Whether another module stands in one of the places."""
    return any(siblings.get(name) is not module for siblings, name, module in places)


def warn_of_moved(names: list[str], edits: str) -> None:
    """Say that edits act on other modules than they did."""
    warnings.warn(
        f"another module is now in the place of {article_list(names, 3)}, which {edits} change; "
        "they act on it from here on",
        stacklevel=4,
    )


def check_editable(model: nn.Module, name: str) -> nn.Module:
    """Return the module called ``name`` if a weight edit may change it.

    Raises:
        UnsupportedUseError: It is no Linear, Conv1D or single expert, or its weight is tied to
            another module.
    """
    module = find_module(model, name)
    if isinstance(module, ExpertProjection):
        if module.expert is None:
            raise UnsupportedUseError(
                f"{name!r} is one parameter with {module.experts.count} experts; change single "
                f"ones, as {module.name_of(0)!r}, or use FTM or a closed-form method, which do"
            )
        return module
    if not is_projection(module):
        raise UnsupportedUseError(
            f"module {name!r} is of type {type(module).__name__}, and weight edits change Linear "
            "and Conv1D modules and experts only; choose a projection of a block"
        )
    weight = getattr(module, "weight", module)
    tied = _tied_by_name(model, name) if getattr(weight, "is_meta", False) else ()
    for other_name, other in model.named_modules():
        if base_layer(other) is module:
            continue
        if getattr(other, "weight", None) is weight or other_name in tied:
            raise UnsupportedUseError(
                f"the weight of {name!r} is tied to {other_name!r}, so changing one would change "
                "both; choose a projection inside a block"
            )
    return module


def _tied_by_name(model: nn.Module, name: str) -> set[str]:
    """Modules tied to one: offloaded weights are placeholders, which are not the same tensor."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    pairs = [{k.removesuffix(".weight") for k in pair} for pair in tied.items()]
    return {other for pair in pairs if name in pair for other in pair}


def float_dtype(model: nn.Module) -> torch.dtype:
    """What a model computes in; quantised weights are of another type."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype edits are added in: at least float32, as half precision swallows small deltas."""
    return torch.promote_types(dtype, torch.float32)
