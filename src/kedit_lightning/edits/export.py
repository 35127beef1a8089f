"""Edits of weights as LoRA adapters in peft's format."""

from __future__ import annotations

import json
import re
import reprlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kedit_lightning.edits.edit import Edit, EditableModel
from kedit_lightning.edits.fused_factors import fused_changes
from kedit_lightning.edits.kinds.weights import AdapterEdit
from kedit_lightning.edits.low_rank import LowRankDelta
from kedit_lightning.edits.materialisation import OneOrSeveral
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.projections import find_module, is_transposed
from kedit_lightning.edits.rank_truncation import joined_factors, of_rank, truncate
from kedit_lightning.errors import EditFileError, UnsupportedUseError, article_list

__all__ = ["load_adapter", "save_adapter"]

#: Fields of peft's config that are read here, or that change nothing about finished factors.
_READ = (
    {"peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config"}
    | {"base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    | {"use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    | {"lora_dropout", "fan_in_fan_out", "init_lora_weights", "eva_config", "megatron_core"}
    | {"qalora_group_size", "ensure_weight_tying"}
    | {"init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"}
    | {"total_step"}
)
#: Ends of the names of the factors, by the type of the adapter.
_FACTORS = {
    "LORA": (".lora_A.weight", ".lora_B.weight"),
    "ADALORA": (".lora_A", ".lora_B", ".lora_E"),
}
#: Ways to start the factors that leave the base model's weights as they are.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def save_adapter(
    base: EditableModel, edits: OneOrSeveral[Edit], folder: str | Path, rank: int | None = None
) -> Path:
    """Write edits as one LoRA adapter in peft's format.

    All modules get the rank of the largest change, filled up with zeros, and ``lora_alpha`` is that
    rank: engines that read one alpha for the whole file and no patterns, as llama.cpp does, then
    add the same as peft.  Combine it with other adapters by ``combination_type="cat"`` or
    ``set_adapter``; ``"linear"`` mixes the factors of different adapters.  Changes of single
    experts become one of the parameter that holds them (``target_parameters``), for peft alone.

    Args:
        base: The base model.
        edits: The edits, or one; they need not be applied.
        folder: Where the adapter is written.
        rank: The largest rank, at which changes are cut off and dense ones are written as
            products (:func:`truncate` says what is lost); by default low-rank edits alone, whole.

    Raises:
        UnsupportedUseError: An edit is not low-rank.
    """
    totals = joined_factors(edits if rank is None else [truncate(base, edits, rank).edit])
    fused = fused_changes(base.model, totals)
    experts = {change.projection.name_of(e) for change in fused.values() for e in change.deltas}
    totals = {name: total for name, total in totals.items() if name not in experts}
    ranks = [total.rank for total in totals.values()]
    common = max([*ranks, *(change.rank for change in fused.values())])
    tensors: dict[str, Tensor] = {}
    for name, change in fused.items():
        a, b = change.factors(common)
        stem = f"base_model.model.{name.rpartition('.')[0]}"
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    for name, total in totals.items():
        a, b = of_rank(total, common)
        stem = f"base_model.model.{name}"
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    transposed = [name for name in totals if is_transposed(find_module(base.model, name))]
    if transposed:
        warnings.warn(
            f"'{base.name}' keeps the weights of {article_list(transposed, 2)} transposed "
            "(Conv1D). peft reads this adapter as it is; llama.cpp's converter transposes such "
            "factors, so it refuses them or, where a projection is square, adds something else: "
            "write its adapter with --export gguf-lora, or export the full model for it",
            stacklevel=2,
        )
    checkpoint: Any = base.model.config
    config = LoraConfig(
        r=common,
        lora_alpha=common,  # so the adapter is added unscaled
        target_modules=list(totals),
        target_parameters=list(fused) or None,
        fan_in_fan_out=bool(transposed),
        base_model_name_or_path=getattr(checkpoint, "_name_or_path", "") or base.name,
        revision=getattr(checkpoint, "_commit_hash", None),
        task_type="SEQ_2_SEQ_LM" if getattr(checkpoint, "is_encoder_decoder", 0) else "CAUSAL_LM",
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))
    return folder


def _other_meaning(config: Mapping[str, Any]) -> list[str]:
    """Fields of an adapter's config by which its factors mean something else than plain LoRA."""
    usual = LoraConfig().to_dict()
    strange = [
        name
        for name, value in config.items()
        if name not in _READ and value and value != usual.get(name)
    ]
    # PiSSA, OLoRA, CorDA and others also change the weights that the factors are added to.
    started = config.get("init_lora_weights", True)
    return [*strange, *(["init_lora_weights"] if started not in _PLAIN_STARTS else [])]


def load_adapter(
    base: EditableModel, folder: str | Path, origin: EditOrigin | None = None
) -> AdapterEdit:
    """Read a LoRA or AdaLoRA adapter in peft's format as an edit.

    Raises:
        EditFileError: The folder holds no adapter.
        UnsupportedUseError: The adapter does more than add low-rank matrices to projections.
    """
    folder = Path(folder)
    weights = folder / "adapter_model.safetensors"
    for file in (folder / "adapter_config.json", weights):
        if not file.is_file():
            raise EditFileError(f"{folder} holds no adapter to read: it has no {file.name}")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(weights)
        kind = config.get("peft_type")
    except (ValueError, SafetensorError, AttributeError) as error:
        raise EditFileError(f"the adapter in {folder} is damaged: {error}") from error
    others = [k for k in tensors if not k.endswith(_FACTORS.get(str(kind), ()))]
    strange = _other_meaning(config)
    if kind not in _FACTORS or strange or others:
        settings = [f"'{name}': {reprlib.repr(config[name])}" for name in strange]
        raise UnsupportedUseError(
            f"the adapter in {folder} is no plain LoRA (type {kind}; settings that change what its "
            f"factors mean: {article_list(settings, 4) or 'none'}; tensors beside its factors: "
            f"{article_list(others, 3) or 'none'}); only plain LoRA adds low-rank matrices, so "
            "merge it into a full model with peft and load that as base model"
        )
    end, read = _FACTORS[kind][0], _lora_factors if kind == "LORA" else _adalora_factors
    names = [key.removesuffix(end) for key in tensors if key.endswith(end)]
    try:
        factors = {n.removeprefix("base_model.model."): read(config, tensors, n) for n in names}
    except KeyError as error:
        raise EditFileError(f"the adapter in {folder} is damaged: it has no {error}") from error
    return AdapterEdit(base, {n: delta for n, delta in factors.items() if delta.rank}, origin)


def _lora_factors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str
) -> LowRankDelta:
    """``B A`` of a module with the scale of LoRA in ``B``."""
    a, b = (tensors[f"{name}{end}"] for end in _FACTORS["LORA"])
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    # The keys are patterns for the end of a module's name, as in peft.
    matching = (v for k, v in alphas.items() if re.match(rf"(.*\.)?({k})$", name))
    alpha = next(matching, config.get("lora_alpha", 8))
    return LowRankDelta(a, b * (alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a))))


def _adalora_factors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str
) -> LowRankDelta:
    """``P (Λ Q)`` of a module; its scale is that of the rank at the start, as peft divides."""
    a, b, values = (tensors[f"{name}{end}"] for end in _FACTORS["ADALORA"])
    rank = config.get("init_r", AdaLoraConfig.init_r)
    return LowRankDelta(a * values, b * (config.get("lora_alpha", 8) / (rank + 1e-5)))
