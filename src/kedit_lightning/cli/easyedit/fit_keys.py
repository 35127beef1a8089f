"""Keys of ``hparams`` of the methods that are fitted: hypernetworks, and SERAC."""

from __future__ import annotations

from typing import Any

from kedit_lightning.cli.easyedit.key_rules import (
    Hparams,
    Reading,
    Rule,
    Rules,
    batch,
    fixed,
    modules,
    to,
    unused,
    when,
    whole,
)


def _steps(value: Any, hparams: Hparams) -> Reading:
    steps = whole(value / (hparams.get("accumulate_bs") or 1))
    return Reading({"trainer.max_steps": steps, "trainer.max_epochs": -1})


def _validations(value: Any, hparams: Hparams) -> Reading:
    every = whole(value / (hparams.get("accumulate_bs") or 1))
    settings = {"trainer.val_check_interval": every, "trainer.check_val_every_n_epoch": None}
    return Reading(settings)


def _written_together(value: Any, hparams: Hparams) -> Reading:
    """``batch_size`` of a fit: examples that one edit writes."""
    together = batch(value, hparams).settings if "alg_name" in hparams else {}
    return Reading({"n_edits": int(value), **together})


def _checkpoint(value: Any, _: Hparams) -> Reading:
    if value is None:
        return Reading(remark="the network is fitted first")
    return Reading(
        remark=f"{value} is a pickle of EasyEdit's own networks, which is not read; fit again, and "
        "name the checkpoint with --ckpt_path",
        differs=True,
    )


_ALSO = unused("the best state and the last are kept; -c trainer/fit stops when scores do not rise")
#: What all fits read.
FITTED: Rules = {
    "archive": _checkpoint,
    "lr": to("lr"),
    "seed": to("seed_everything", int),
    "batch_size": _written_together,
    "accumulate_bs": to("accumulate", int),
    "grad_clip": to("clip"),
    "opt": fixed("networks take steps of Adam", "Adam"),
    "max_iters": _steps,
    "val_interval": _validations,
    "val_steps": to("trainer.limit_val_batches", int),
    "log_interval": lambda value, hparams: Reading(
        {"trainer.log_every_n_steps": whole(value / (hparams.get("accumulate_bs") or 1))}
    ),
    "dropout": fixed("the base model drops nothing out", 0),
    "train_base": fixed("the base model is never trained", False),
    "cbase": unused("the base model is never trained"),
    "no_grad_layers": fixed("no layer is left out of the backward pass", None),
    "half": lambda value, _: when(value, "base_model.dtype", "bfloat16", "weights are float32"),
    "inner_params": modules,
    **dict.fromkeys(
        (
            *("model_save_pt", "early_stop_patience", "early_stop_key", "eval_log_interval"),
            *("final_eval", "eval_only", "val_batch_size", "max_epochs"),
        ),
        _ALSO,
    ),
    "iedit": fixed("rephrases and other pictures share one weight, `c_edit`", 0.1),
}

MEND: Rules = {
    **FITTED,
    "edit_lr": to("edit_lr"),
    "lr_lr": to("lr_lr"),
    "cedit": to("c_edit"),
    "cloc": to("c_loc"),
    "n_hidden": to("blocks", lambda value: int(value) + 1),
    "rank": to("rank", int),
    "shared": to("shared"),
    "norm": to("normalise"),
    "lr_scale": fixed("edits are not scaled", 1),
    "combine": fixed("factors are transformed together", True),
    "one_sided": fixed("both factors are transformed", False),
    "x_only": fixed("both factors are transformed", False),
    "delta_only": fixed("both factors are transformed", False),
    "hidden_dim": fixed("hidden layers are as wide as their input", None),
    "init": fixed("networks start as the identity", "id"),
    "act": fixed("hidden layers keep what is positive", "relu"),
    "mlp_class": fixed("networks are residual, of low rank", "IDMLP"),
}

_BOUNDED = unused("the divergence is bounded by `margin`, with a multiplier of its own")
KE: Rules = {
    **FITTED,
    "edit_lr": unused("the scale of an edit is learned"),
    "lr_lr": unused("the scale of an edit is learned"),
    "cedit": _BOUNDED,
    "cloc": _BOUNDED,
}

_TOKENS = {"ans": "answer", "mask": "all"}
MALMEN: Rules = {
    **FITTED,
    "lr": to("edit_lr"),
    "meta_lr": to("lr"),
    "loc_coef": to("c_loc"),
    "max_grad_norm": to("clip"),
    "n_blocks": to("blocks", int),
    "rank": to("rank", int),
    "n_edits": to("n_edits", int),
    "batch_size": to("at_once", int),
    "token": to("tokens", lambda value: _TOKENS.get(value, value)),
    "editor_batch_size": unused("it changes no result"),
}


def _serac_batch(value: Any, hparams: Hparams) -> Reading:
    """As many examples a step as the batches that are accumulated hold together."""
    return Reading({"batch_size": int(value * (hparams.get("accumulate_bs") or 1))})


_SCOPE = "the scope is a distance in embeddings of the base model's hidden states"
_off: Rule = fixed(_SCOPE, False, None)
SERAC: Rules = {
    **{key: rule for key, rule in FITTED.items() if key != "inner_params"},
    "inner_params": unused("no projection is edited"),
    "small_name": to("counterfactual"),
    "cedit": to("c_edit"),
    "cloc": to("c_loc"),
    "batch_size": _serac_batch,
    "accumulate_bs": unused("`batch_size` holds the examples of all batches of a step"),
    "edit_lr": unused("an edit is stored, and takes no step"),
    "lr_lr": unused("an edit is stored, and takes no step"),
    "edit_bs": unused("facts are stored one by one"),
    "cls_name": unused(_SCOPE),
    "cls_class": unused(_SCOPE),
    "supervised": fixed("the scope is learned from questions in and out of it", True),
    "square": fixed(_SCOPE, True),
    "dist_heads": fixed(_SCOPE, 1),
    "lora": _off,
    "freeze": _off,
    "unlikelihood": unused("of answers that are to be unlearned; facts have none"),
    **dict.fromkeys(
        (
            *("soft_weighting", "checkpoint_grad", "cross_attend", "cos", "bound_embeds"),
            *("use_all_negatives", "freeze_cntr"),
        ),
        _off,
    ),
}
