"""How a key of an ``hparams`` file of EasyEdit is read, and rules that many methods share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

#: Keys of a file with their values, numbers as numbers.
Hparams: TypeAlias = Mapping[str, Any]

#: Names that models have for the projection by which an MLP writes.
_DOWN = r"(down_proj|c_proj|fc_out|fc2|wo|w2|dense_4h_to_h|out_proj)"


@dataclass(frozen=True)
class Reading:
    """What a key becomes.

    Args:
        settings: Our settings by name: of the method, or of ``base_model.``, or of ``trainer.``.
        remark: Why it has no counterpart, or what else there is to know.
        differs: Whether the edit, or the fit, is another one than EasyEdit's for that reason.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""
    differs: bool = False


Rule: TypeAlias = Callable[[Any, Hparams], Reading]
Rules: TypeAlias = Mapping[str, Rule]


def to(name: str, convert: Callable[[Any], Any] = lambda value: value, remark: str = "") -> Rule:
    """A key that is a setting of ours, under another name or in another form."""
    return lambda value, _: Reading({name: convert(value)}, remark)


def unused(reason: str) -> Rule:
    """A key that needs no counterpart."""
    return lambda value, _: Reading(remark=reason)


def fixed(ours: str, *expected: Any) -> Rule:
    """A key that has a counterpart for some values, by what the method always does."""

    def read(value: Any, _: Hparams) -> Reading:
        if value in expected:
            return Reading(remark=ours)
        return Reading(remark=f"the file has {value!r}; {ours}", differs=True)

    return read


def other(reason: str) -> Rule:
    """A key that changes what EasyEdit does, in a way that has no setting here."""
    return lambda value, _: Reading(remark=f"the file has {value!r}; {reason}", differs=True)


# ---- values


def number(value: Any) -> Any:
    """Texts that are numbers as numbers, since YAML 1.1 reads ``5e-1`` as a text; "None" as null.

    >>> number("5e-1"), number("1e3"), number(["2e-2", "none", "all"]), number("4bit")
    (0.5, 1000.0, [0.02, None, 'all'], '4bit')
    """
    if isinstance(value, dict):
        return {name: number(part) for name, part in value.items()}
    if isinstance(value, list):
        return [number(part) for part in value]
    if isinstance(value, str):
        if value.casefold() in ("none", "null"):
            return None
        if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
            return float(value)
    return value


def module_name(parameter: str) -> str:
    """Name of the module of a parameter.

    >>> module_name("model.layers[27].mlp.down_proj.weight")
    'model.layers.27.mlp.down_proj'
    """
    return re.sub(r"\[(\d+)\]", r".\1", parameter).removesuffix(".weight")


def block_of(parameter: str) -> int | None:
    """Number of the block that a module or parameter is in, the same here: both count from 0."""
    found = re.search(r"\.(\d+)\.", module_name(parameter))
    return int(found[1]) if found else None


def writes(parameter: str) -> bool:
    """Whether a name is that of a down projection of an MLP."""
    name = module_name(parameter)
    return re.search(rf"\.{_DOWN}$", name) is not None and "attn" not in name


def listed(value: Any) -> list[Any]:
    """A list, of one item if it is none."""
    return list(value) if isinstance(value, list | tuple) else [value]


def whole(value: float) -> int:
    """A number of steps, at least one."""
    return max(1, math.ceil(value))


# ---- rules of many methods


def one_layer(value: Any, _: Hparams) -> Reading:
    """``layers`` of a method that edits one; of several the last, at which values are found."""
    layers = listed(value)
    remark = ""
    if len(layers) > 1:
        remark = (
            f"the file has {layers}; this method edits one layer, and values are found at the last "
            "one; MEMIT spreads them over several"
        )
    return Reading({"layer": layers[-1]} if layers else {}, remark, len(layers) > 1)


def some_layers(value: Any, _: Hparams) -> Reading:
    """``layers`` that are all, or found, when the list is empty."""
    return Reading({"layers": listed(value)}) if listed(value) else Reading(remark="all layers")


def modules(value: Any, _: Hparams) -> Reading:
    """``inner_params`` of a method that takes names of modules."""
    return Reading({"modules": [module_name(name) for name in listed(value)]})


def layer_of_module(value: Any, _: Hparams) -> Reading:
    """``inner_params`` of a method that takes the down projection of one block."""
    name, *more = listed(value)
    remark = "" if writes(name) else f"the file has {name}; here it is that block's down projection"
    if more:
        remark = f"the file has {len(more) + 1} modules; here it is the first"
    return Reading({"layer": block_of(name)}, remark, bool(remark))


def written_module(value: Any, _: Hparams) -> Reading:
    """``rewrite_module_tmp``: found by structure if it is the one that methods write to."""
    if all(writes(name) for name in listed(value)):
        return Reading(remark="the down projection of the MLP is found by the model's structure")
    return Reading(
        remark=f"the file has {value}; here the down projection of the MLP is written", differs=True
    )


def layer_or_module(value: Any, _: Hparams) -> Reading:
    """``inner_params`` of a method that takes a block or the name of any module."""
    name, *more = listed(value)
    place = {"layer": block_of(name)} if writes(name) else {"module": module_name(name)}
    remark = f"the file has {len(more) + 1} modules; here it is the first" if more else ""
    return Reading(place, remark, bool(more))


def batch(value: Any, _: Hparams) -> Reading:
    """``batch_size``: how many facts ``batch_edit`` writes at once."""
    if value is None or value <= 1:
        return Reading(remark="each fact has an edit of its own, which is the usual protocol")
    return Reading({"trainer.protocol.mode": "batch", "trainer.protocol.chunk_size": value})


def when(value: Any, name: str, setting: Any, reason: str) -> Reading:
    """A setting if a switch is on, and else the reason for leaving it out."""
    return Reading({name: setting}) if value else Reading(remark=reason)


def weights_in(dtype: str) -> Rule:
    """A switch to half precision, of which a file may have several."""
    return lambda value, _: when(value, "base_model.dtype", dtype, "weights are in another type")


def chat(value: Any, _: Hparams) -> Reading:
    """``use_chat_template``, which belongs to the data here."""
    if not value:
        return Reading(remark="prompts are taken as they stand")
    return Reading(remark="give the facts `messages` in place of `prompt`", differs=True)


def loaded_name(value: Any, hparams: Hparams) -> Reading:
    """``model_name``, unless it is the short name of what ``name`` says."""
    if hparams.get("name"):
        return Reading(remark="`name` says which model is loaded")
    return Reading({"base_model.name": value})


def _all(names: Sequence[str], rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


#: Keys of every method.
COMMON: Rules = {
    "alg_name": unused("chooses the method"),
    "alg": unused("chooses the method"),
    "model_name": loaded_name,
    "name": to("base_model.name"),
    "device": unused("the trainer takes the device there is; --trainer.devices chooses"),
    "model_parallel": lambda value, _: when(
        value, "base_model.device_map", "auto", "the model is on one device"
    ),
    "fp16": weights_in("float16"),
    "bf16": weights_in("bfloat16"),
    "half": weights_in("float16"),
    "attn_implementation": lambda value, _: when(
        value, "base_model.attn_implementation", value, "the usual one"
    ),
    "use_chat_template": chat,
    "batch_size": batch,
    **_all(
        ("model_class", "tokenizer_class", "tokenizer_name"),
        unused("the model's own files say so"),
    ),
    **_all(
        ("max_length", "padding_side", "enable_thinking", "language_model_only"),
        unused("neither padding nor a length changes a result; rows that are too long are refused"),
    ),
    **_all(("results_dir", "check_dir"), unused("--output names the folder of a run")),
    **_all(
        ("silent", "debug", "verbose", "save", "log_errors", "results_file"),
        unused("what a run writes and prints stands in its output folder"),
    ),
    # of pictures
    **_all(
        ("coco_image", "rephrase_image", "train_annotation_path", "eval_annotation_path"),
        unused("the data say where pictures are"),
    ),
    **_all(
        (
            *("qformer_checkpoint", "qformer_name_or_path", "state_dict_file", "pretrained_ckpt"),
            *("hidden_act", "file_type"),
        ),
        unused("the model's own files say so"),
    ),
    "exact_match": unused("both token match and exact match are scored"),
}
