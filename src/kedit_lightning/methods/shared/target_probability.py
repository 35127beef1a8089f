"""Whether an edit has written its facts: the probability of each target under it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from kedit_lightning.base_models import BaseModel
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.edits import Edit
from kedit_lightning.edits.origin import TARGET_PROBABILITIES
from kedit_lightning.errors import FactsNotWrittenWarning, article_list
from kedit_lightning.methods.shared.answer_passes import answered_rows
from kedit_lightning.metrics.functional import total_log_prob
from kedit_lightning.requests import EditRequest

#: A target that is less likely than this was not written.
LEAST = 0.5
#: Rows of a forward pass; fixed, since an edit's notes count into its id.
_ROWS = 32
_DIGITS = 4


@torch.no_grad()
def target_probabilities(base: BaseModel, requests: Sequence[EditRequest]) -> list[float]:
    """Probability of each request's whole target behind its prompt, of the model as it stands.

    They are rounded to four digits, so that equal edits have equal notes where kernels differ in
    the last bits; a probability that is NaN is 0.
    """
    found: list[float] = []
    for part in chunks(requests, _ROWS):
        rows = answered_rows(base, part)
        total = total_log_prob(base.answer_log_probs(rows), rows.answer_mask)
        found += total.exp().nan_to_num(0.0).tolist()
    return [round(probability, _DIGITS) for probability in found]


def note_probabilities(edit: Edit, requests: Sequence[EditRequest]) -> None:
    """Note in an edit the probability of each of its targets, in the order of its requests."""
    base: Any = edit.base
    if not requests:
        return
    with edit:
        found = target_probabilities(base, requests)
    edit.note(**{TARGET_PROBABILITIES: found})


def note_each(edits: Sequence[Edit], requests: Sequence[EditRequest]) -> Sequence[Edit]:
    """Note in each edit the probability of its one target; the rows carry their edits."""
    if not all(edit.can_be_carried for edit in edits):
        for edit, request in zip(edits, requests, strict=True):
            note_probabilities(edit, [request])
        return edits
    for pairs in chunks(list(zip(edits, requests, strict=True)), _ROWS):
        part, own = [edit for edit, _ in pairs], [request for _, request in pairs]
        base: Any = part[0].base
        with base.edits.carried(part):
            found = target_probabilities(base, own)
        for edit, probability in zip(part, found, strict=True):
            edit.note(**{TARGET_PROBABILITIES: [probability]})
    return edits


def warn_of_unwritten(
    name: str, edit: Edit, requests: Sequence[EditRequest], settings: object
) -> None:
    """Warn once if targets of an edit have a probability below one half, and count them.

    Args:
        name: The method that computed it.
        edit: An edit with the note.
        requests: What it is to write.
        settings: Settings of the method.
    """
    pairs = list(zip(requests, edit.origin.notes[TARGET_PROBABILITIES], strict=True))
    weak = [f"{r.prompt!r} -> {r.target_new.strip()!r} ({p:.2g})" for r, p in pairs if p < LEAST]
    if weak:
        warnings.warn(
            f"{name} did not write {len(weak)} of {len(pairs)} facts: under the edit "
            f"the target's probability is below one half for {article_list(weak, 5)}; "
            f"{ways_out(settings)}",
            FactsNotWrittenWarning,
            stacklevel=3,
        )


def ways_out(settings: object, writes_facts: bool = True) -> str:
    """What to try where facts do not hold, by the settings of the method.

    Args:
        settings: A dataclass.
        writes_facts: Whether the method does, rather than change how any answer is chosen.
    """
    if not writes_facts:
        return (
            "this method chooses tokens in another way and writes no facts: take one that does, "
            "such as FTM, or measure what it changes with `kedit test`"
        )
    names = {field.name for field in fields(settings)}  # type: ignore[arg-type]
    ways: list[str] = []
    if layer := names & {"layer", "layers"}:
        ways = [f"another layer (--model.{layer.pop()}; the callback LayerSweep measures each)"]
    if "steps" in names:
        ways.append("more steps (--model.steps)")
    return f"try {', '.join(ways)}{', or ' * bool(ways)}another method"
