"""Low-rank edits as LoRA adapters in peft's format."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from kedit_lightning.edits.edit import Edit, EditableModel, materialise
from kedit_lightning.edits.effects import AddToOutput, KeepMemory
from kedit_lightning.edits.kinds.weights import AdapterEdit
from kedit_lightning.edits.low_rank import LowRankDelta
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.projections import find_module, is_transposed
from kedit_lightning.errors import EditFileError, UnsupportedUseError, article_list

__all__ = ["load_adapter", "materialise", "save_adapter"]


def _low_rank_changes(edits: Iterable[Edit]) -> dict[str, list[LowRankDelta]]:
    """Low-rank changes of edits, by module name."""
    changes: dict[str, list[LowRankDelta]] = {}
    for part in (part for edit in edits for part in edit.parts()):
        for effect in part.effects():
            if isinstance(effect, AddToOutput) and effect.delta.only_low_rank is not None:
                changes.setdefault(effect.module, []).append(effect.delta.only_low_rank)
            elif not isinstance(effect, KeepMemory):
                raise UnsupportedUseError(
                    f"only low-rank edits can be exported as a LoRA adapter, and edit {part.id} by "
                    f"{part.origin.method or 'hand'} is of kind '{part.kind}'; export the full "
                    "model instead"
                )
    return changes


def save_adapter(base: EditableModel, edits: Iterable[Edit], folder: str | Path) -> Path:
    """Write low-rank edits as one LoRA adapter in peft's format.

    Raises:
        UnsupportedUseError: An edit is not low-rank.
    """
    tensors: dict[str, Tensor] = {}
    totals = {name: LowRankDelta.sum(deltas) for name, deltas in _low_rank_changes(edits).items()}
    ranks = {name: total.rank for name, total in totals.items()}
    for name, total in totals.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = total.a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = total.b.cpu().contiguous()
    modules = [find_module(base.model, name) for name in totals]
    encoder_decoder = getattr(base.model.config, "is_encoder_decoder", False)
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),  # equal to the rank, so the adapter is added unscaled
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(totals),
        fan_in_fan_out=any(is_transposed(module) for module in modules),
        base_model_name_or_path=base.name,
        task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM",
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
    """Read a LoRA adapter in peft's format as an edit.

    Raises:
        EditFileError: The folder holds no adapter.
        UnsupportedUseError: The adapter does more than add low-rank matrices to projections.
    """
    folder = Path(folder)
    weights = folder / "adapter_model.safetensors"
    for file in (folder / "adapter_config.json", weights):
        if not file.is_file():
            raise EditFileError(f"{folder} holds no adapter to read: it has no {file.name}")
    config = PeftConfig.from_pretrained(str(folder)).to_dict()
    tensors = load_file(weights)
    others = [k for k in tensors if not k.endswith((".lora_A.weight", ".lora_B.weight"))]
    if config["peft_type"] != "LORA" or config.get("use_dora") or others:
        raise UnsupportedUseError(
            f"the adapter in {folder} is no plain LoRA (type {config['peft_type']}, tensors beside "
            f"its factors: {article_list(others, 3) or 'none'}); only plain LoRA adds low-rank "
            "matrices, so merge it into a full model with peft and load that as base model"
        )
    alphas: dict[str, float] = config["alpha_pattern"] or {}
    factors: dict[str, LowRankDelta] = {}
    for key in (k for k in tensors if k.endswith(".lora_A.weight")):
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        # The keys are patterns for the end of a module's name, as in peft.
        matching = (v for k, v in alphas.items() if re.match(rf"(.*\.)?({k})$", name))
        alpha = next(matching, config["lora_alpha"])
        scale = alpha / (a.shape[0] ** 0.5 if config.get("use_rslora") else a.shape[0])
        factors[name] = LowRankDelta(a, b * scale)
    return AdapterEdit(base, factors, origin)
