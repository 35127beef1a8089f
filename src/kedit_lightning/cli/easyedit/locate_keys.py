"""Keys of ``hparams`` of the methods that locate, then edit."""

from __future__ import annotations

from typing import Any

from kedit_lightning.cli.easyedit.key_rules import (
    Hparams,
    Reading,
    Rules,
    fixed,
    listed,
    modules,
    one_layer,
    other,
    to,
    unused,
    weights_in,
    written_module,
)

_FIT = unused(
    "`kedit fit -c FILE --data Texts --data.path FOLDER` collects statistics of keys from plain "
    "text; they are kept by model, layer and text"
)
_STRUCTURE = unused("modules are found by the model's structure")

#: What all closed forms read.
LOCATE: Rules = {
    "layers": to("layers", listed),
    "v_num_grad_steps": to("steps", int),
    "v_lr": to("lr"),
    "v_weight_decay": to("weight_decay"),
    "clamp_norm_factor": to("clamp"),
    "kl_factor": to("kl_factor"),
    "v_loss_layer": unused("values are judged at the model's output, the last layer"),
    "fact_token": fixed("the key is that of the subject's last token", "subject_last"),
    "layer_selection": fixed("all layers are edited", "all"),
    "rewrite_module_tmp": written_module,
    "rewrite_module_tmps": written_module,
    **dict.fromkeys(
        ("layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module", "lm_head_module"),
        _STRUCTURE,
    ),
    **dict.fromkeys(("stats_dir", "mom2_dataset", "mom2_n_samples", "mom2_dtype"), _FIT),
}


def _adjusted(value: Any, _: Hparams) -> Reading:
    if value:
        return Reading(
            {"statistics": "auto"},
            "without a fit statistics come from a small packaged text, with a warning; "
            "`required` makes that an error",
        )
    return Reading(
        {"statistics": "identity"}, "keys count alike, as in EasyEdit, not by statistics"
    )


def _contexts(value: Any, _: Hparams) -> Reading:
    """Pairs of a length in tokens and a number of texts."""
    counts = {int(length): int(number) for length, number in value}
    alike = counts.keys() == {5, 10} and counts[5] == counts[10]
    remark = "" if alike or not value else f"the file has {value}; here half have 5 tokens, half 10"
    return Reading({"contexts": sum(counts.values())}, remark, bool(remark))


_MIXED = "the key is the prompt's own where ROME has it, and the mean over contexts elsewhere"
_RANK_ONE: Rules = {
    "layers": one_layer,
    "mom2_adjustment": _adjusted,
    "context_template_length_params": _contexts,
    "enable_prompt_keys": fixed("no method here takes the prompt's key alone", False),
}

#: ROME and R-ROME, between which the flags of R-ROME choose.
ROME: Rules = {
    **LOCATE,
    **_RANK_ONE,
    "enable_random_prefix_keys": fixed(_MIXED, True),
    "original_implementation": fixed(_MIXED, True, False),
}
RROME: Rules = {
    **LOCATE,
    **_RANK_ONE,
    "enable_random_prefix_keys": fixed("the key is the mean over contexts", True),
    "original_implementation": unused("chooses ROME, or RROME"),
}


def _used_anyway(value: Any, _: Hparams) -> Reading:
    remark = "without a fit they come from a small packaged text, with a warning"
    if not value:
        remark = f"the code never reads this key, and uses statistics; {remark}"
    return Reading({"statistics": "auto"}, remark)


MEMIT: Rules = {
    **LOCATE,
    "mom2_adjustment": _used_anyway,
    "mom2_update_weight": to("preserve"),
    # of variants that share its file
    "context_template_length_params": unused("five texts of 10 tokens, whatever the file says"),
}
PMET: Rules = {
    **MEMIT,
    "nll_loss_factor": fixed("the loss of the answer has weight 1", 1),
}
EMMET: Rules = {
    **MEMIT,
    "layers": one_layer,
    "emmet_lambda": to("eps"),
    "update_norm_lambda": to("ridge"),
}
ALPHAEDIT: Rules = {
    **MEMIT,
    "mom2_update_weight": unused("the null space takes its place; the code never reads it"),
    "nullspace_threshold": to("threshold"),
    "L2": to("legacy_size_cost"),
    "P_loc": unused("null spaces follow from statistics, and are kept by model and layer"),
}
SPHERE: Rules = {
    **ALPHAEDIT,
    "suppression_strength": to("off_main"),
    "cumulative_ratio": fixed("the main directions hold half of the energy", 0.5),
}


def _weights(value: Any, _: Hparams) -> Reading:
    weights = listed(value)
    if len(set(weights)) == 1:
        return Reading({"preserve": weights[0]})
    return Reading(
        {"preserve": weights[-1]}, f"the file has {weights}; here all layers have the last", True
    )


EAMET: Rules = {
    **MEMIT,
    "mom2_update_weight": _weights,
    "clamp_norm_factor": unused("aligned values are bounded by `clamp_ks_factor`"),
    "clamp_ks_factor": to("clamp"),
    "ks_bs": unused("it changes no result"),
    "tau": fixed("similarities are compared at a temperature of 0.07", 0.07),
    "cs_factor": fixed("the divergence of similarities has weight 2", 2),
    "mse_factor": fixed("squared differences of similarities have weight 8", 8),
    "norm_factor": other("`weight_decay` is the one weight of the size of a change here"),
    "delta_init": fixed("a change starts along its value, as long as its key", "target_init"),
    "weight_decay_method": fixed("the size of a change is its norm", "norm"),
}

UNKE: Rules = {
    "layers": one_layer,
    "lr": to("lr"),
    "optim_num_step": to("steps", int),
    "ex_data_num": to("texts", int),
    "v_num_grad_steps": to("value_steps", int),
    "v_lr": to("value_lr"),
    "v_weight_decay": to("value_decay"),
    "clamp_norm_factor": to("clamp"),
    "fact_token": fixed("the key is that of the prompt's last token", "last"),
    **{
        key: LOCATE[key]
        for key in ("v_loss_layer", "layer_selection", "layer_module_tmp", "mlp_module_tmp")
    },
    **dict.fromkeys(
        ("rewrite_module_tmp", "attn_module_tmp", "ln_f_module", "lm_head_module"),
        unused("all projections of the block are trained, found by the model's structure"),
    ),
}

KN: Rules = {
    "steps": to(
        "steps", int, "with one step EasyEdit takes the gradient at zero; here it is at the middle"
    ),
    "adaptive_threshold": to("threshold"),
    "batch_size": to("batch_size", int),
    "refine": fixed("neurons come from the request's own prompt", False),
    "p": unused("neurons are not refined over other prompts"),
    **dict.fromkeys(("n_toks", "lr_scale"), unused("the code never reads it")),
}


def _turn(value: Any, _: Hparams) -> Reading:
    return Reading({"trainer.protocol.mode": "sequential", "trainer.protocol.chunk_size": value})


ULTRAEDIT: Rules = {
    "inner_params": modules,
    "lr": to("lr"),
    "batch_size": _turn,
    "batch_size_once": to("batch_size", int),
    "half": weights_in("float16"),
    "token": fixed(
        "gradients are those at answer tokens, as in the paper's code; EasyEdit's `mask` takes "
        "the prompt's tokens too",
        "ans",
    ),
    "editor_batch_size": unused("it changes no result"),
    "dropout": fixed("the base model drops nothing out", 0.0),
    "no_grad_layers": fixed("no layer is left out of the backward pass", None),
}
