"""Writing edits into a copy of the weights, and into peft's adapter format."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from kedit_lightning.edits.edit import Edit, EditableModel, EditOrigin
from kedit_lightning.edits.kinds.weights import AdapterEdit, LowRankEdit
from kedit_lightning.edits.projections import compute_dtype, is_transposed
from kedit_lightning.errors import EditFileError, UnsupportedUseError, article_list


@torch.no_grad()
def materialise(base: EditableModel, edits: Iterable[Edit]) -> nn.Module:
    """A copy of the base model with the edits written into its weights.

    Raises:
        UnsupportedUseError: An edit changes no weights, or the weights are quantised.
    """
    if getattr(base.model, "is_quantized", False):
        raise UnsupportedUseError(
            f"the weights of '{base.name}' are quantised and cannot hold an edit exactly; keep it "
            "as a file and apply it, or load the model without quantization to export it"
        )
    totals: dict[str, Tensor] = {}
    for edit in edits:
        for name, delta in edit.deltas().items():
            delta = delta.to(compute_dtype(delta.dtype))
            totals[name] = totals[name] + delta if name in totals else delta
    with base.edits.restored():
        base.edits.clear()
        clone = copy.deepcopy(base.model)
    for name, delta in totals.items():
        parameter = clone.get_parameter(name)
        # Rounded once, after all edits have been added up.
        total = parameter.to(compute_dtype(parameter.dtype)) + delta.to(parameter.device)
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
    encoder_decoder = getattr(base.model.config, "is_encoder_decoder", False)
    # With alpha equal to the rank the adapter is added unscaled.
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(factors),
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
    from peft import PeftConfig
    from safetensors.torch import load_file

    folder = Path(folder)
    weights = folder / "adapter_model.safetensors"
    for file in (folder / "adapter_config.json", weights):
        if not file.is_file():
            raise EditFileError(
                f"{folder} holds no adapter that can be read: it has no {file.name}"
            )
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
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for key in (k for k in tensors if k.endswith(".lora_A.weight")):
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        # The keys are patterns for the end of a module's name, as in peft.
        matching = (v for k, v in alphas.items() if re.match(rf"(.*\.)?({k})$", name))
        alpha = next(matching, config["lora_alpha"])
        scale = alpha / (a.shape[0] ** 0.5 if config.get("use_rslora") else a.shape[0])
        factors[name] = (a, b * scale)
    return AdapterEdit(base, factors, origin)
