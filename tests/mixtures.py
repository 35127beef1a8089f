"""Tiny mixtures of experts, one for each way to hold experts and for more types."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from support import tiny_tokenizer
from tiny_decoders import tiny_config

from kedit_lightning import BaseModel
from kedit_lightning.base_models.mixture import routed_block
from kedit_lightning.edits.expert_projection import ExpertProjection

#: Types whose blocks, or some of them, have routed experts and no dense MLP.
ROUTED = (
    "mixtral",
    "gpt_oss",
    "dbrx",
    "jetmoe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "jamba",
    "flex_olmo",
    "phimoe",
)
#: One of each way to hold experts, but for Llama 4's; the tests of every day take these.
FORMS = ROUTED[:4]
#: Types whose blocks have shared experts beside the routed ones.
SHARED = ("llama4_text", "qwen2_moe", "deepseek_v3")


def tiny_model(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model of a type with random weights, the same at every call.

    Its experts are run one by one, since their grouped product refuses float64.
    """
    config = tiny_config(kind)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # larger than the usual start, so that routers choose
                parameter.mul_(4.0)
    return model.to(dtype).eval()


def tiny_mixture(kind: str, dtype: torch.dtype = torch.float64) -> BaseModel:
    """A base model on it."""
    return BaseModel(tiny_model(kind, dtype), tiny_tokenizer(True), name=kind)


def routed_layer(base: BaseModel) -> int:
    """Number of the last block with routed experts."""
    names = [base.layout.block_name(i) for i in range(len(base.layout))]
    size = base.layout.hidden_size
    return max(i for i, name in enumerate(names) if routed_block(name, base.module(name), size))


def has_experts(base: BaseModel, layer: int) -> bool:
    """Whether a block has routed experts alone."""
    try:
        return base.layout.mlp_block(layer).is_routed
    except ValueError:
        return False


def mixture(base: BaseModel, layer: int) -> ExpertProjection:
    """The projection of all experts of a block, which may have a shared expert as well."""
    name = base.layout.block_name(layer)
    block = routed_block(name, base.module(name), base.layout.hidden_size)
    assert block is not None
    module = base.module(block.down)
    assert isinstance(module, ExpertProjection)
    return module


def first_routed_layer(base: BaseModel) -> int:
    """Number of the first block with routed experts alone: later ones read what it writes."""
    return min(i for i in range(len(base.layout)) if has_experts(base, i))
