"""Writing edits into a copy of the weights, and into peft's adapter format."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from kedit_lightning.edits.base import Edit, EditableModel, EditOrigin
from kedit_lightning.edits.modules import compute_dtype, is_transposed
from kedit_lightning.edits.weights import AdapterEdit, LowRankEdit
from kedit_lightning.errors import UnsupportedUseError


def _without_hooks(model: nn.Module) -> nn.Module:
    """Deep copy of a model, without the hooks that edits have attached."""
    clone = copy.deepcopy(model)
    for module in clone.modules():
        module._forward_hooks = OrderedDict()
        module._forward_pre_hooks = OrderedDict()
    return clone


@torch.no_grad()
def materialise(base: EditableModel, edits: Iterable[Edit]) -> nn.Module:
    """A copy of the base model with the edits written into its weights.

    Raises:
        UnsupportedUseError: An edit changes no weights.
    """
    clone = _without_hooks(base.model)
    for edit in edits:
        for name, delta in edit.deltas().items():
            parameter = clone.get_parameter(name)
            dtype = compute_dtype(parameter.dtype)
            total = parameter.to(dtype) + delta.to(parameter.device, dtype)
            parameter.copy_(total.to(parameter.dtype))
    return clone


def _low_rank_parts(edits: Iterable[Edit]) -> list[LowRankEdit]:
    parts = [part for edit in edits for part in edit.parts()]
    low: list[LowRankEdit] = []
    for part in parts:
        if not isinstance(part, LowRankEdit):
            raise UnsupportedUseError(
                f"only low-rank edits can be exported as a LoRA adapter, and edit {part.id} by "
                f"{part.origin.method or 'hand'} is of kind '{part.kind}'; export the full model "
                "instead"
            )
        low.append(part)
    return low


def save_adapter(base: EditableModel, edits: Iterable[Edit], folder: str | Path) -> Path:
    """Write low-rank edits as one LoRA adapter in peft's format.

    Raises:
        UnsupportedUseError: An edit is not low-rank.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for part in _low_rank_parts(edits):
        for name, pair in part.factors.items():
            factors.setdefault(name, []).append(pair)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, pairs in factors.items():
        a = torch.cat([a for a, _ in pairs])
        b = torch.cat([b for _, b in pairs], dim=1)
        ranks[name] = a.shape[0]
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = b.cpu().contiguous()
    modules = [base.model.get_submodule(name) for name in factors]
    # With alpha equal to the rank the adapter is added unscaled.
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(factors),
        fan_in_fan_out=any(is_transposed(module) for module in modules),
        base_model_name_or_path=base.name,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))
    return folder


def load_adapter(
    base: EditableModel, folder: str | Path, origin: EditOrigin | None = None
) -> AdapterEdit:
    """Read a LoRA adapter in peft's format as an edit."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    folder = Path(folder)
    config = PeftConfig.from_pretrained(str(folder)).to_dict()
    tensors = load_file(folder / "adapter_model.safetensors")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        scale = alpha / (a.shape[0] ** 0.5 if config.get("use_rslora") else a.shape[0])
        factors[name] = (a, tensors[key.replace("lora_A", "lora_B")] * scale)
    return AdapterEdit(base, factors, origin)
