"""Models as people hold them: offloaded, quantised, wrapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from support import tiny_model
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

CPU = torch.device("cpu")


def offloaded_to_memory(model: Any) -> Any:
    """The model with weights that come to their modules for the time of a call."""
    cpu_offload(model, execution_device=CPU)
    return model


def offloaded_to_disk(model: Any, folder: Path) -> Any:
    """The model with all weights on disk."""
    disk_offload(model, folder, execution_device=CPU)
    return model


def spread(model: Any, blocks: str, folder: Path) -> Any:
    """The model as a device map holds it: every other block on disk, the rest in memory."""
    places = {name: "cpu" for name, _ in model.named_children()}
    owner = blocks.rpartition(".")[0]
    places.pop(owner.partition(".")[0])
    places |= {f"{owner}.{n}": "cpu" for n, _ in model.get_submodule(owner).named_children()}
    del places[blocks]
    count = len(model.get_submodule(blocks))
    places |= {f"{blocks}.{i}": "disk" if i % 2 else "cpu" for i in range(count)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def _source(folder: Path) -> Path:
    """A folder with the weights of a tiny model whose widths fit the blocks of quantisation."""
    source = folder / "source"
    if not source.is_dir():
        tiny_model("llama", torch.float32, hidden_size=64, intermediate_size=128).save_pretrained(
            source
        )
    return source


def _loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(_source(folder), dtype=torch.float32, **options)


def _compiled(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def _with_static_cache(model: Any) -> Any:
    model.generation_config.cache_implementation = "static"
    return model


def _with_adapter(model: Any) -> Any:
    """The model with a LoRA adapter on the projections that methods edit."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def _sharded(model: Any, folder: Path) -> Any:
    """The model as FSDP holds it, in a group of this process alone."""
    if not distributed.is_initialized():
        store = f"file://{folder / 'store'}"
        distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


class PackedLinear(nn.Module):
    """A linear layer as GPTQ and AWQ hold it: small integers and scales, in buffers alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))

    def dequantize_weight(self) -> torch.Tensor:
        """The matrix, ``[out, in]``."""
        return self.qweight * self.scales

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The map of states ``[..., in]``."""
        return nn.functional.linear(states, self.dequantize_weight())


def packed(model: Any) -> Any:
    """The model with all projections of its blocks packed."""
    for name, module in [*model.model.layers.named_modules()]:
        if isinstance(module, nn.Linear):
            owner, _, key = name.rpartition(".")
            setattr(model.model.layers.get_submodule(owner), key, PackedLinear(module))
    return model


def _int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


#: How a model may be held, and what makes it so, in a folder.
HELD: dict[str, Callable[[Path], Any]] = {
    "compiled": lambda folder: _compiled(_loaded(folder)),
    "static cache": lambda folder: _with_static_cache(_loaded(folder)),
    "in memory": lambda folder: offloaded_to_memory(_loaded(folder)),
    "on disk": lambda folder: offloaded_to_disk(_loaded(folder), folder / "disk"),
    "spread": lambda folder: spread(_loaded(folder), "model.layers", folder / "disk"),
    "8 bit": lambda f: _loaded(f, quantization_config=BitsAndBytesConfig(load_in_8bit=True)),
    "4 bit": lambda f: _loaded(f, quantization_config=BitsAndBytesConfig(load_in_4bit=True)),
    "torchao": lambda folder: _loaded(folder, quantization_config=_int8()),
    "quanto": lambda folder: _loaded(folder, quantization_config=QuantoConfig(weights="int8")),
    "packed": lambda folder: packed(_loaded(folder)),
    "peft": lambda folder: _with_adapter(_loaded(folder)),
    "sharded": lambda folder: _sharded(_loaded(folder), folder),
    "tied": lambda folder: tiny_model("llama", torch.float32, tie_word_embeddings=True),
}


def _untied() -> Any:
    """The tied model, with a head of its own that has the same values."""
    model = HELD["tied"](Path())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


#: Plain models that do the same as some of those; the others do as the plain one does.
TWINS: dict[str, Callable[[Path], Any]] = {
    "peft": lambda folder: _with_adapter(_loaded(folder)).merge_and_unload(),
    "tied": lambda folder: _untied(),
}


def hold(how: str, folder: Path) -> Any:
    """A tiny model, held in a way."""
    return HELD[how](folder)


def twin(how: str, folder: Path) -> Any:
    """The plain model that one held in a way should act like."""
    return TWINS.get(how, _loaded)(folder)
