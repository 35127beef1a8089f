"""The methods of EasyEdit by their names, with what each of their keys becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kedit_lightning.cli.easyedit import fit_keys as fitted
from kedit_lightning.cli.easyedit import locate_keys as locate
from kedit_lightning.cli.easyedit import tuned_keys as tuned
from kedit_lightning.cli.easyedit.key_rules import COMMON, Hparams, Rules
from kedit_lightning.cli.messages import UsageError

#: What many methods of EasyEdit do, whose loops have no early stop.
_ALL_STEPS = (0.0, "all steps are taken, as in EasyEdit")


@dataclass(frozen=True)
class Converted:
    """A method of EasyEdit here.

    Args:
        method: Its class here.
        rules: What becomes of each key that is its own.
        own: Settings that no key has, with which it does what EasyEdit's code does.
        why: What each of them is for.
        fitted: Whether it is fitted first.
    """

    method: str
    rules: Rules
    own: Mapping[str, Any] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    fitted: bool = False

    @property
    def keys(self) -> Rules:
        """What becomes of each key that a file of the method may have."""
        return {**COMMON, **self.rules}


def _with(method: str, rules: Rules, *, fitted: bool = False, **own: tuple[Any, str]) -> Converted:
    settings = {name: value for name, (value, _) in own.items()}
    return Converted(method, rules, settings, {name: why for name, (_, why) in own.items()}, fitted)


def _always(
    method: str, rules: Rules, *, fitted: bool = False, **own: tuple[Any, str]
) -> Callable[[Hparams], Converted]:
    """A method whose class here does not hang on the file."""
    converted = _with(method, rules, fitted=fitted, **own)
    return lambda _: converted


def _ft(hparams: Hparams) -> Converted:
    objective = hparams.get("objective_optimization", "prompt_last")
    if objective == "target_new":
        return _with("FTM", tuned.FT, objective=("target_new", "the objective of the file"))
    if objective == "prompt_last":
        reason = "all answer tokens are predicted from the prompt's last token, as in EasyEdit"
        return _with("FTL", tuned.FT, legacy_easyedit_objective=(True, reason))
    raise UsageError(
        f"objective_optimization is {objective!r}; EasyEdit knows prompt_last (FT-L) and "
        "target_new (FT-M)"
    )


def _lora(hparams: Hparams) -> Converted:
    if str(hparams.get("lora_type", "lora")).casefold() == "adalora":
        return _with("AdaLoRA", tuned.ADALORA)
    return _with("LoRA", tuned.LORA, stop_loss=_ALL_STEPS)


def _rank_one(hparams: Hparams) -> Converted:
    if hparams.get("original_implementation"):
        return _with("ROME", locate.ROME)
    return _with("RROME", locate.RROME)


def _stated(hparams: Hparams) -> Converted:
    if hparams.get("use_icl_examples") is False:
        return _with("PROMPT", tuned.PROMPT)
    return _with("IKE", tuned.IKE)


_OUTER = "the loss is that of the request's own wording, as in EasyEdit"
_ASCENT = "the released sign of an edit's step, which training turns"
_MEND: dict[str, tuple[Any, str]] = {
    "own_wording": (True, _OUTER),
    "n_rephrases": (0, _OUTER),
    "legacy_sign": (True, _ASCENT),
}

_METHODS: dict[str, Callable[[Hparams], Converted]] = {
    "ROME": _always("ROME", locate.ROME),
    "R-ROME": _rank_one,
    "MEMIT": _always("MEMIT", locate.MEMIT),
    "PMET": _always("PMET", locate.PMET),
    "EMMET": _always(
        "EMMET",
        locate.EMMET,
        eps=(0.1, "what EasyEdit takes where the file has no emmet_lambda"),
        legacy_absolute_eps=(True, "emmet_lambda as it stands, as in EasyEdit"),
    ),
    "AlphaEdit": _always("AlphaEdit", locate.ALPHAEDIT),
    "SPHERE": _always("AlphaEdit", locate.SPHERE),
    "EAMET": _always("MEMIT", locate.EAMET, aligned=(True, "MEMIT with this is EAMET")),
    "UnKE": _always("UnKE", locate.UNKE),
    "KN": _always("KN", locate.KN),
    "UltraEdit": _always(
        "UltraEdit",
        locate.ULTRAEDIT,
        legacy_shared_statistics=(True, "weights of a shape share statistics, as in EasyEdit"),
    ),
    "FT": _ft,
    "LoRA": _lora,
    "QLoRA": _always("QLoRA", tuned.QLORA, stop_loss=_ALL_STEPS),
    "DPO": _always("DPOEdit", tuned.DPO, stop_loss=_ALL_STEPS),
    "DINM": _always(
        "DINM",
        tuned.DINM,
        legacy_easyedit=(True, "the divergence has no gradient, as in EasyEdit"),
    ),
    "GRACE": _always("GRACE", tuned.GRACE),
    "WISE": _always("WISE", tuned.WISE, decay=(False, "the learning rate stays")),
    "DEFER": _always("DEFER", tuned.DEFER, stop_loss=_ALL_STEPS),
    "MELO": _always("MELO", tuned.MELO),
    "MEND": _always("MEND", fitted.MEND, fitted=True, **_MEND),
    "InstructEdit": _always("InstructEdit", fitted.MEND, fitted=True, **_MEND),
    "KE": _always("KE", fitted.KE, fitted=True),
    "MALMEN": _always(
        "MALMEN",
        fitted.MALMEN,
        fitted=True,
        c_edit=(1.0, "the loss of the answers has weight 1, as in EasyEdit"),
    ),
    "SERAC": _always("SERAC", fitted.SERAC, fitted=True),
    "IKE": _stated,
    "DoLa": _always(
        "DoLa",
        tuned.DOLA,
        legacy_divergence=(True, "layers are compared as in the released code"),
    ),
    "DeCo": _always("DeCo", tuned.DECO),
}
_BY_NAME = {name.casefold().replace("-", ""): choose for name, choose in _METHODS.items()}
_BY_NAME["seracmulti"] = _BY_NAME["serac"]

#: Names of the methods whose files are read.
METHOD_NAMES = tuple(_METHODS)


def converted(hparams: Hparams, name: str | None = None) -> Converted:
    """The method of a file.

    Args:
        hparams: Its keys and values.
        name: EasyEdit's name of the method where the file has none.

    Raises:
        UsageError: The file names no method, or one that is not here.
    """
    name = name or hparams.get("alg_name") or hparams.get("alg")
    if name is None and {"optim_num_step", "ex_data_num"} <= hparams.keys():
        name = "UnKE"  # its files have no name
    if name is None:
        raise UsageError(
            "the file has neither alg_name nor alg, so it does not say which method it is for; "
            f"name it with --method, one of {', '.join(METHOD_NAMES)}"
        )
    choose = _BY_NAME.get(str(name).casefold().replace("-", "").replace("_", ""))
    if choose is None:
        raise UsageError(
            f"there is no counterpart of the method '{name}' here; files are read of "
            f"{', '.join(METHOD_NAMES)}"
        )
    return choose(hparams)
