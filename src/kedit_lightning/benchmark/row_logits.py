"""Logits at all positions of a row, its prompt and pictures too, for scores that compare them."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, EncodedRow
from kedit_lightning.metrics import ForwardPass
from kedit_lightning.metrics.functional import widened
from kedit_lightning.requests import Probe


def probe_row(base: BaseModel, probe: Probe) -> EncodedRow:
    """The row of a probe's prompt with its preferred answer, if it has one."""
    answer = probe.answers[0] if probe.answers else None
    return base.encode(probe.prompt, answer, image=probe.image)


def row_pass(base: BaseModel, row: EncodedRow, plain: EncodedRow | None) -> ForwardPass:
    """A pass that holds the logits at all columns of one row, those of the decoder alone if any.

    Args:
        base: The base model, as its stack stands.
        row: The row.
        plain: The same row without edits, which the unedited model reads too. Where edits have
            made the row longer, as many of its last columns are compared.
    """
    logits, base_logits = _logits(base, row), None
    if plain is not None:
        with base.edits.suspended():
            base_logits = _logits(base, plain)
        last = min(logits.shape[1], base_logits.shape[1])
        logits, base_logits = logits[:, -last:], base_logits[:, -last:]
    mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return ForwardPass(logits, torch.zeros_like(mask).long(), mask, base_logits)


def _logits(base: BaseModel, row: EncodedRow) -> Tensor:
    """Logits at all columns. Shape ``[1, tokens, vocab]``."""
    rows = base.pad([row])
    read = rows.inputs.get("decoder_input_ids", rows.inputs["input_ids"])
    columns = torch.arange(read.shape[1], device=base.device)[None]
    return widened(base.logits_at(rows, columns))
