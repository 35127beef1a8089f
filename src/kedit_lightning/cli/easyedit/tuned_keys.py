"""Keys of ``hparams`` of fine-tuning, memories, and methods that train nothing."""

from __future__ import annotations

import math
from typing import Any

from kedit_lightning.cli.easyedit.key_rules import (
    Hparams,
    Reading,
    Rules,
    batch,
    block_of,
    fixed,
    layer_of_module,
    layer_or_module,
    listed,
    module_name,
    other,
    some_layers,
    to,
    unused,
    whole,
    writes,
)

_UNREAD = unused("the code never reads it")
_STRUCTURE = unused("modules are found by the model's structure")
_TEMPLATES = ("layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module")


# ---- fine-tuning


def _tuned_module(value: Any, _: Hparams) -> Reading:
    if writes(value):
        return Reading(remark="the down projection of the MLP is found by the model's structure")
    return Reading({"modules": [module_name(value).partition("{}.")[2]]})


def _bound(value: Any, _: Hparams) -> Reading:
    return Reading({"norm_constraint": math.inf if value in (False, None) else value})


def _decay(value: Any, _: Hparams) -> Reading:
    remark = "EasyEdit draws weights to zero; here it is the change that is drawn" if value else ""
    return Reading({"weight_decay": value}, remark, bool(value))


def _tuned_batch(value: Any, hparams: Hparams) -> Reading:
    return Reading({"batch_size": int(value), **batch(value, hparams).settings})


FT: Rules = {
    "layers": to("layers", listed),
    "num_steps": to("steps", int),
    "batch_size": _tuned_batch,
    "lr": to("lr"),
    "weight_decay": _decay,
    "kl_factor": _UNREAD,
    "norm_constraint": _bound,
    "objective_optimization": unused("chooses FTL (prompt_last), or FTM (target_new)"),
    "rewrite_module_tmp": _tuned_module,
    **dict.fromkeys((*_TEMPLATES, "lm_head_module"), _STRUCTURE),
}


def _ends(value: Any) -> list[str]:
    """Ends of names; patterns for the number of a block are left out, since all blocks are meant.

    >>> _ends(["q_proj", "model.layers.*.self_attn.v_proj"])
    ['q_proj', 'self_attn.v_proj']
    """
    return [name.rpartition("*.")[2] for name in listed(value)]


LORA: Rules = {
    "lora_type": unused("chooses LoRA, or AdaLoRA"),
    "layers": some_layers,
    "num_steps": to("steps", int),
    "batch_size": _tuned_batch,
    "lr": to("lr"),
    "weight_decay": fixed("adapters have no weight decay", 0),
    "rank": to("rank", int),
    "lora_alpha": to("alpha"),
    "lora_dropout": to(
        "dropout", float, "of the training alone; EasyEdit scores with dropout, here there is none"
    ),
    "target_modules": to("target_modules", _ends),
    "sh_lr": other("the learning rate stays as it is"),
    **dict.fromkeys(("kl_factor", "norm_constraint"), _UNREAD),
}


def _shared_rank(value: Any, _: Hparams) -> Reading:
    return Reading(
        {"rank": int(value), "initial_rank": max(12, math.ceil(value * 1.5))},
        "EasyEdit never takes rank away and keeps the 12 of the start; here it comes down to this",
        True,
    )


ADALORA: Rules = {**LORA, "rank": _shared_rank}

DPO: Rules = {
    **LORA,
    "lora_type": fixed("the adapter is LoRA's", "lora"),
    "alpha": to("likelihood"),
    "beta": to("beta"),
}


def _bits(value: Any, _: Hparams) -> Reading:
    return Reading({"base_model.quantization": f"{int(value)}bit"})


QLORA: Rules = {
    **LORA,
    "lora_type": fixed("the adapter is LoRA's", "lora"),
    "lora_r": to("rank", int),
    "quantization_bit": _bits,
    "quant_type": fixed("weights are in NF4", "nf4"),
    "double_quant": fixed("constants are quantised as well", True),
}


def _dinm_layer(value: Any, _: Hparams) -> Reading:
    if not value:
        return Reading(remark="the layer is located for each request")
    return Reading({"layer": listed(value)[0]})


DINM: Rules = {
    "layers": _dinm_layer,
    "num_steps": to("steps", int),
    "lr": to("lr"),
    "weight_decay": fixed("there is none", 0),
    "kl_factor": to("edit_weight", float, "in spite of its name it weighs the safe reply"),
    "norm_constraint": fixed("there is no bound", False, None),
    "suffix_system_prompt": to("suffix"),
    "max_output_length": to("trainer.protocol.max_new_tokens", int),
    "rewrite_module_tmp": _STRUCTURE,
    **dict.fromkeys((*_TEMPLATES, "lm_head_module"), _STRUCTURE),
}


# ---- memories

_REPLACED = {"replace_last": "last", "replace_all": "all", "replace_prompt": "prompt"}

GRACE: Rules = {
    "inner_params": layer_or_module,
    "edit_lr": to("lr"),
    "n_iter": to("steps", int),
    "eps": to("radius"),
    "val_init": to("value_init"),
    "replacement": to("replacement", lambda value: _REPLACED.get(value, value)),
    "dist_fn": fixed("distances are Euclidean", "euc"),
    "val_train": fixed("values are trained by gradients", "sgd"),
    "eps_expand": fixed("an entry grows until it covers the new key", "coverage"),
    "val_reg": fixed("values are not regularised", None),
    "dropout": fixed("values are trained without dropout", 0),
    "num_pert": unused("of training by perturbation alone"),
    "reg": unused("the code never stops early"),
}


def _margins(value: Any, _: Hparams) -> Reading:
    return Reading(dict(zip(("alpha", "beta", "gamma"), value, strict=True)))


def _shards(value: Any, hparams: Hparams) -> Reading:
    return Reading({"shards_per_memory": whole(value / hparams.get("save_freq", value))})


def _replayed(value: Any, _: Hparams) -> Reading:
    if not value:
        return Reading({"replay": 0})
    return Reading({"replay": 10}, "EasyEdit draws from all earlier facts; here from ten", True)


def _ratio(value: Any, _: Hparams) -> Reading:
    remark = f"the file has {value}, with which a fact's own prompt is not recognised; here 1"
    return Reading({"activation_ratio": min(value, 1.0)}, remark if value > 1 else "", value > 1)


WISE: Rules = {
    "inner_params": layer_of_module,
    "edit_lr": to("lr"),
    "n_iter": to("steps", int),
    "mask_ratio": to("mask_ratio"),
    "norm_constraint": to("norm_constraint"),
    "act_margin": _margins,
    "act_ratio": _ratio,
    "save_freq": to("shard_size", int),
    "merge_freq": _shards,
    "merge_alg": to("merge"),
    "densities": to("density"),
    "weights": fixed("shards count alike", 1),
    "retrieve": to("retrieve"),
    "replay": _replayed,
    "objective_optimization": fixed("answers alone are learned", "only_label"),
    **dict.fromkeys(
        ("load_path", "save_path"), unused("--output keeps edits, --edits applies them again")
    ),
}

DEFER: Rules = {
    "inner_params": layer_of_module,
    "edit_lr": to("lr"),
    "n_iter": to("steps", int),
    "threshold": fixed("a gate is open from one half on", 0.5),
}


def _key_layer(value: Any, hparams: Hparams) -> Reading:
    down = writes(value)
    return Reading({"key_layer": block_of(value), "projection": -1 if down else 0})


def _trained_blocks(value: Any, _: Hparams) -> Reading:
    return Reading({"layers": sorted({int(block_of(name) or 0) for name in listed(value)})})


_ROUTING = unused("of parts of GRACE's and SERAC's code that MELO does not use")
MELO: Rules = {
    "model.name": to("base_model.name"),
    "model.grace_layer": _key_layer,
    "model.target_modules": _trained_blocks,
    **dict.fromkeys(
        ("model.class_name", "model.tokenizer_class", "model.tokenizer_name"),
        unused("the model's own files say so"),
    ),
    "model.fan_in_fan_out": _STRUCTURE,
    "model.pt": unused("--output names the folder of a run"),
    "grace.num_iter": to("steps", int),
    "grace.init_radius": to("radius"),
    "grace.num_edit_per_block": to("facts_per_block", int),
    "grace.num_rank_per_block": to("rank", int),
    "grace.num_block": to("scale", float, "what a block adds is multiplied by this number"),
    "grace.edit_lr": to("lr"),
    "grace.dist_fn": fixed("distances are Euclidean", "euc"),
    "grace.key_id": fixed("the key is that of the last token", -1),
    **dict.fromkeys(
        (
            *("grace.name", "grace.val_init", "grace.val_train", "grace.val_reg", "grace.reg"),
            *("grace.replacement", "grace.expand_mode", "grace.num_pert", "grace.metric_period"),
            *("lora.cls_name", "lora.cls_class", "lora.supervised", "lora.cos", "lora.freeze"),
            *("lora.square", "lora.bound_embeds", "lora.use_all_negatives", "lora.freeze_lora"),
            *("lora.dist_heads", "lora.cross_attend", "lora.soft_weighting", "lora.lora_dropout"),
            *("lora.checkpoint_grad", "lora.lora_r", "lora.lora_alpha", "lora_task_type", "task"),
        ),
        _ROUTING,
    ),
}


# ---- methods that train nothing

IKE: Rules = {
    "k": to(
        "demonstrations",
        int,
        "copies, rephrases and other facts in the shares of the paper, the nearest last",
    ),
    "sentence_model_name": to("retriever", str, "needs the extra `retrieval`"),
    "use_icl_examples": unused("chooses IKE, or PROMPT"),
}
PROMPT: Rules = {
    "k": unused("the fact is stated without demonstrations"),
    "sentence_model_name": to("retriever", str, "needs the extra `retrieval`"),
    "use_icl_examples": unused("chooses IKE, or PROMPT"),
}


def _dola_layers(value: Any, _: Hparams) -> Reading:
    return Reading({"layers": value if value in ("low", "high") else listed(value)})


DOLA: Rules = {
    "dola_layers": _dola_layers,
    "final_layer": unused("the last layer is contrasted"),
    "relative_top": to("relative_top"),
}
DECO: Rules = {
    "early_exit_layers": to("layers", listed),
    "alpha": to("alpha"),
    "threshold_top_p": to("top_p"),
    "threshold_top_k": to("top_k", int),
}
