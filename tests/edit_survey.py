"""What FT-M and ROME do to a tiny random model of a type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tiny_decoders
import torch
from support import tiny_tokenizer

from kedit_lightning import BaseModel, Edit, EditRequest
from kedit_lightning.errors import KEditError
from kedit_lightning.methods import FTM, ROME
from kedit_lightning.methods.locate.shared.subject_states import subject_states

#: The target's logit must rise by so many standard deviations of all logits, or to the top.
RISE = 1.0
#: The change that is measured where ROME writes may differ so much from the planned one.
WRITE_ERROR = 1e-2
#: Matrices are drawn so many times larger than at their usual start, so that blocks matter.
SCALE = 8.0
#: Settings that make a random model answer in a few steps.
FTM_SETTINGS: dict[str, Any] = {"lr": 1e-2, "steps": 25}
ROME_SETTINGS: dict[str, Any] = {
    "statistics": "identity",
    "contexts": 2,
    "steps": 25,
    "clamp": 10.0,
    "weight_decay": 1e-3,
}
#: What single types need beyond that.
OWN_ROME_SETTINGS: dict[str, dict[str, Any]] = {
    # No value of its first block serves all contexts, which random blocks above turn apart.
    "roformer": {"layer": 1},
    # Its router scales experts down, so that values are small beside hidden states.
    "zaya": {"clamp": 100.0},
}
#: What the page of supported models says about all this.
ABOUT = (tiny_decoders.LAYERS, SCALE, tiny_decoders.START, OWN_ROME_SETTINGS)
#: Its subject comes last, since random attention carries little from one token to another, and
#: its target is one token.
REQUEST = EditRequest("The country of Amber Falls", "Italy", "Amber Falls")


@dataclass(frozen=True)
class Uptake:
    """What became of an edit.

    Args:
        method: Name of the method.
        verdict: ``takes``, ``refused`` or ``fails``.
        reason: Why, for the last two.
        rise: By how many standard deviations of all logits the target's logit rose.
        write_error: Relative difference of measured and planned change, of ROME.
    """

    method: str
    verdict: str
    reason: str = ""
    rise: float = 0.0
    write_error: float = 0.0


def uptakes(kind: str) -> list[Uptake]:
    """What FT-M and ROME do to a model of a type."""
    return [_uptake(kind, _ftm), _uptake(kind, _rome)]


def _ftm(base: BaseModel) -> tuple[Edit, float]:
    return FTM(base, **FTM_SETTINGS).edit([REQUEST]), 0.0


def _rome(base: BaseModel) -> tuple[Edit, float]:
    """The edit, and how much its change where it writes differs from the planned one."""
    planned: list[torch.Tensor] = []

    class Watched(ROME):
        def update(self, module, states, residuals, prior):
            planned.append(residuals[0])
            return super().update(module, states, residuals, prior)

    method = Watched(base, **{**ROME_SETTINGS, **OWN_ROME_SETTINGS.get(base.name, {})})
    edit = method.edit([REQUEST])
    (module,) = method.edited

    def written() -> torch.Tensor:
        return subject_states(base, [module], [REQUEST]).outputs[module][0, 0].double()

    before = written()
    with edit:
        change = written() - before
    return edit, float((change - planned[-1]).norm() / planned[-1].norm())


def _uptake(kind: str, make: Callable[[BaseModel], tuple[Edit, float]]) -> Uptake:
    name = {_ftm: "FTM", _rome: "ROME"}[make]
    base = BaseModel(
        tiny_decoders.tiny_decoder(kind, scale=SCALE), tiny_tokenizer(bos=True), name=kind
    )
    try:
        rows = base.rows([REQUEST.prompt], [REQUEST.target_new])
        before = base.answer_logits(rows)
        edit, error = make(base)
        with edit:
            during = base.answer_logits(rows)
        after = base.answer_logits(rows)
    except KEditError as refusal:
        return Uptake(name, "refused", str(refusal))
    except Exception as error:  # whatever a model of another library may raise
        said = " ".join(str(error).split())
        return Uptake(name, "fails", f"{type(error).__name__}: {said[:200]}")
    target = int(rows.answer_ids[0, 0])
    rise = float((during - before)[0, 0, target] / before[0, 0].std())
    wrong = ""
    if not torch.equal(before, after):
        wrong = "rollback is not exact"
    elif error > WRITE_ERROR:
        wrong = f"ROME's write differs by {error:.3f} from the planned one"
    elif rise < RISE and int(during[0, 0].argmax()) != target:
        wrong = f"the target's logit rises by {rise:.2f} standard deviations"
    return Uptake(name, "fails" if wrong else "takes", wrong, rise, error)
