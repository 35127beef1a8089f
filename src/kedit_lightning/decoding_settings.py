"""Which settings of a checkpoint's generation config act when a model answers.

A checkpoint may come with penalties, beams, bans and forced tokens, which ``generate`` of
transformers applies unasked. Answers that are scored are the model's own, so they are set aside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from kedit_lightning.errors import UnsupportedUseError

Generation: TypeAlias = Literal["greedy", "model"]

#: What every answer needs: token ids, and settings of the computation that change no answer.
KEPT = frozenset(
    {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "low_memory",
        "transformers_version",
    }
)
#: What turns the likeliest answer into another one. A checkpoint's own values act under ``model``.
_CHOICE: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "length_penalty": 1.0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "forced_decoder_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "guidance_scale": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "token_healing": False,
    "watermarking_config": None,
    "stop_strings": None,
}
#: What never acts: how long answers are and how many, their form, sampling, and shortcuts.
_NEVER: dict[str, Any] = {
    "max_length": None,
    "max_new_tokens": None,
    "max_time": None,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "prefill_chunk_size": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
}
#: Settings of a second, faster model; without one they do nothing.
_IDLE = frozenset(
    {
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "assistant_ensemble_weight",
        "target_lookbehind",
        "max_matching_ngram_size",
        "speculation_type",
    }
)
#: Every setting with the value at which it does nothing.
NEUTRAL = {**_CHOICE, **_NEVER}
#: All settings of which is decided here whether they act; a test compares it with transformers'.
KNOWN = KEPT | NEUTRAL.keys() | _IDLE


def generation_config(model: Any) -> dict[str, Any]:
    """The generation config that a checkpoint came with, as plain values of JSON."""
    config = getattr(model, "generation_config", None)
    values: dict[str, Any] = {} if config is None else json.loads(config.to_json_string())
    return values


def set_aside(config: Mapping[str, Any], generation: Generation = "greedy") -> dict[str, Any]:
    """The settings of a generation config that do not act, with the config's values.

    Args:
        config: The generation config as a mapping.
        generation: ``greedy`` leaves none of its choices in force, ``model`` all but sampling.

    Raises:
        UnsupportedUseError: ``generation`` is neither.

    >>> set_aside({"repetition_penalty": 1.05, "top_p": 0.8, "eos_token_id": [1, 2]})
    {'repetition_penalty': 1.05, 'top_p': 0.8}
    """
    if generation not in get_args(Generation):
        known = ", ".join(get_args(Generation))
        raise UnsupportedUseError(f"generation must be one of {known}, got {generation!r}")
    neutral = NEUTRAL if generation == "greedy" else _NEVER
    return {
        name: value
        for name, value in config.items()
        if name in neutral and value is not None and value != neutral[name]
    }


def neutral_options(config: Mapping[str, Any], generation: Generation = "greedy") -> dict[str, Any]:
    """Options of ``generate`` that set those aside: each at the value at which it does nothing."""
    return {"do_sample": False, **{name: NEUTRAL[name] for name in set_aside(config, generation)}}


def in_force(config: Mapping[str, Any], generation: Generation = "greedy") -> dict[str, Any]:
    """The settings of a generation config that answers depend on, beside the model."""
    aside = set_aside(config, generation)
    ids = ("bos_token_id", "eos_token_id", "decoder_start_token_id")
    return {
        name: value
        for name, value in config.items()
        if name not in aside and (name in ids or NEUTRAL.get(name, value) != value)
    }
