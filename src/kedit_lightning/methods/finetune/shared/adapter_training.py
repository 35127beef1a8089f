"""Adapter layers of peft that stand in the place of projections while they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn

from kedit_lightning.edits.compilation import uncompiled
from kedit_lightning.edits.projections import base_layer, expert_projection, is_transposed
from kedit_lightning.edits.weight_storage import device_of, loaded
from kedit_lightning.errors import UnsupportedUseError

#: Name of the adapter inside peft.
ADAPTER = "edit"


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter under training.

    Args:
        tuner: peft's model of the adapter, which holds the projections alone.
        layers: The adapter's layers by the names of the projections.
    """

    tuner: LoraModel
    layers: Mapping[str, LoraLayer]

    @property
    def tensors(self) -> list[nn.Parameter]:
        """What is trained."""
        return [tensor for tensor in self.tuner.parameters() if tensor.requires_grad]


class Projections(nn.Module):
    """Some projections of a model and nothing else, for peft to put its layers around.

    For experts it is the module with the parameter that holds them.

    What peft does to the model it is given, it does to this one: an error half way leaves the base
    model as it was.

    Args:
        model: The base model.
        modules: The projections.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        for number, module in enumerate(modules):
            self.add_module(f"projection{number}", module)
        # peft reads the device of a first parameter; quantised projections may hold buffers alone.
        empty = torch.empty(0, device=device_of(modules[0]))
        self.placed = nn.Parameter(empty, requires_grad=False)
        # What peft asks a model whose weights are quantised.
        self.is_loaded_in_8bit = bool(getattr(model, "is_loaded_in_8bit", False))
        self.is_loaded_in_4bit = bool(getattr(model, "is_loaded_in_4bit", False))
        self.hf_quantizer = getattr(model, "hf_quantizer", None)


def adapted_place(model: nn.Module, name: str) -> tuple[str, str | None]:
    """Name of the module that peft's layer of a projection stands around.

    For all experts of a block also that of the parameter there that holds them.
    """
    if expert_projection(model, name) is None:
        return name, None
    owner, _, parameter = name.rpartition(".")
    return owner, parameter


@contextmanager
def parameters_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards the modules have the same parameters, in the same order.

    peft takes a parameter that it adapts out of its module in each pass, and puts it last.
    """
    before = [dict(module._parameters) for module in modules]
    try:
        yield
    finally:
        for module, parameters in zip(modules, before, strict=True):
            module._parameters.clear()
            module._parameters.update(parameters)


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Owner of a projection, and its name there; below adapters that the model has already."""
    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    while isinstance(getattr(owner.get_submodule(key), "base_layer", None), nn.Module):
        owner, key = owner.get_submodule(key), "base_layer"
    return owner, key


@contextmanager
def standing_in(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, other modules stand in the place of projections; afterwards these are back."""
    places = {name: place_of(model, name) for name in modules}
    before = {name: owner.get_submodule(key) for name, (owner, key) in places.items()}
    try:
        for name, (owner, key) in places.items():
            owner._modules[key] = modules[name]
        yield
    finally:
        for name, (owner, key) in places.items():
            owner._modules[key] = before[name]


@contextmanager
def adapter_training(
    model: nn.Module,
    names: Sequence[str],
    tuner: type[LoraModel],
    config: LoraConfig,
    generator: torch.Generator,
) -> Iterator[TrainedAdapter]:
    """Inside, an adapter acts on projections of a model, with its dropout on.

    Afterwards, also after an exception, the model is what it was: no module of it was changed.
    peft draws its random numbers from torch's global generator, whose state is kept.

    Args:
        model: The model; its own edits and adapters stay in force.
        names: The projections; all experts of a block have the name of their parameter.
        tuner: Kind of the adapter.
        config: Its settings, without the modules.
        generator: Its first number seeds the start of the factors and the dropout.

    Raises:
        UnsupportedUseError: peft has no adapter for a projection of this kind.
    """
    places = [adapted_place(model, name) for name in names]
    modules = [base_layer(model.get_submodule(owner)) for owner, _ in places]
    projections = Projections(model, modules)
    parameters = [parameter for _, parameter in places]
    held = dict(zip(projections._modules, parameters, strict=True))
    config.target_modules = [key for key, parameter in held.items() if parameter is None]
    config.target_parameters = [f"{key}.{p}" for key, p in held.items() if p is not None]
    holders = [module for module, p in zip(modules, parameters, strict=True) if p is not None]
    # peft warns when it must set this by itself.
    config.fan_in_fan_out = any(map(is_transposed, modules))
    devices = {m.device for m in model.parameters() if m.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.manual_seed(generator.initial_seed())
        try:
            # peft puts the factors where the weights are, so those that are offloaded come back.
            with ExitStack() as stack:
                for module in modules:
                    stack.enter_context(loaded(module))
                wrapped = tuner(projections, config, ADAPTER)
        except (TypeError, ValueError, ImportError) as error:
            kinds = ", ".join(sorted({type(module).__name__ for module in modules}))
            raise UnsupportedUseError(
                f"peft puts no adapter around the chosen modules ({kinds}): "
                f"{str(error).splitlines()[0]}; choose other target_modules"
            ) from error
        cast_adapter_dtype(wrapped, ADAPTER)
        layers: dict[str, Any] = dict(zip(names, projections.children(), strict=True))
        for layer in layers.values():
            layer.lora_dropout.train()
        owners = {owner: layer for (owner, _), layer in zip(places, layers.values(), strict=True)}
        with parameters_kept(holders), standing_in(model, owners), uncompiled():
            yield TrainedAdapter(wrapped, layers)


def scaled_factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """``A [rank, d_in]`` and ``B [d_out, rank]`` of a LoRA layer, its scaling in ``B``."""
    a: Any = layer.lora_A[ADAPTER]
    b: Any = layer.lora_B[ADAPTER]
    return a.weight.detach(), b.weight.detach() * layer.scaling[ADAPTER]
