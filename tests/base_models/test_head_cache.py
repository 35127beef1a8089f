"""Heads of rows, of which what several begin with is read once."""

from __future__ import annotations

import pytest
import torch
from support import REQUESTS, tiny_base

from kedit_lightning.base_models.continuation import Continuation
from kedit_lightning.base_models.head_cache import common_beginnings
from kedit_lightning.base_models.rows import EncodedRow

CONTEXTS = ("", "He said that he went there. ", "The river of the old city is wide. ")


def test_beginnings_end_where_rows_part_or_before_the_subject():
    rows = [
        [EncodedRow((1, 5, 6, 7, 8), (2,), 4, 3), EncodedRow((3, 4), (), 1, 1)],
        [EncodedRow((1, 5, 9, 7, 8, 8), (2,), 4, 3), EncodedRow((3, 4, 4), (), 2, 1)],
        [EncodedRow((1, 5, 6, 7), (2,), 2, 2), EncodedRow((3,), (), 0, 0)],
    ]
    assert common_beginnings(rows) == [1, 0] * 3
    assert common_beginnings(rows[:2]) == [2, 0] * 2
    assert common_beginnings(rows[:1]) == [3, 0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "phi"])
@torch.no_grad()
def test_shared_beginnings_change_no_answer(family):
    base = tiny_base(family)
    encoded = [
        [base.encode(text + r.prompt, r.target_new, r.subject) for text in CONTEXTS]
        for r in REQUESTS
    ]
    shared = common_beginnings(encoded)
    rows = [row for request in encoded for row in request]
    calls: list[int] = []

    def note(module, args, kwargs):
        calls.append(kwargs["input_ids"].numel())

    handle = base.model.register_forward_pre_hook(note, with_kwargs=True)
    found, tokens = [], []
    for given in (shared, None):
        passes = Continuation(base, rows, 1, True, shared=given)
        tokens.append(sum(calls))
        calls.clear()
        for part in (passes, passes.select(torch.tensor([4, 1, 9]))):
            at = torch.arange(len(part.rows))
            found.append(part.logits_of((at, part.rows.answer_columns[:, 0])))
        calls.clear()
    handle.remove()
    assert tokens[0] < 0.8 * tokens[1]
    torch.testing.assert_close(found[0], found[2], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found[1], found[3], rtol=1e-9, atol=1e-10)
