"""Texts that the base model writes before prompts, and prompts that leave them no room."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import REQUESTS, tiny_base

from kedit_lightning import EditRequest
from kedit_lightning.methods import MEMIT, ROME
from kedit_lightning.methods.shared.contexts import contexts_of

QUICK = {"statistics": "identity", "steps": 3, "preserve": 1.0}
CONTEXTS = ["He said so. ", "It is a long way from there to here. " * 2]


def long_request(base, room: int) -> EditRequest:
    """A request that leaves room for so many tokens."""
    words = "the river runs to the sea and "
    request = REQUESTS[0]
    prompt = request.prompt
    while True:
        longer = f"{words}{prompt}"
        row = base.encoder.encode(longer, request.target_new)
        if len(row.prompt) + len(row.answer) + room > base.max_tokens:
            return EditRequest(prompt, request.target_new, request.subject)
        prompt = longer


def test_contexts_that_do_not_fit_are_left_out():
    base = tiny_base("gpt2")
    assert contexts_of(base, REQUESTS[0], CONTEXTS) == ["", *CONTEXTS]
    for room, kept in ((20, ["", CONTEXTS[0], ""]), (0, ["", "", ""])):
        request = long_request(base, room)
        with pytest.warns(UserWarning, match="left out where they do not fit into the 128 tokens"):
            found = contexts_of(base, request, CONTEXTS)
        assert found == kept or room == 0
        for context in found:
            base.encode(context + request.prompt, request.target_new)
    assert contexts_of(base, request, []) == [""]


@pytest.mark.parametrize("method", [ROME, MEMIT])
def test_a_prompt_that_leaves_no_room_is_edited_as_without_contexts(method):
    base = tiny_base("gpt2")
    request = long_request(base, 0)
    solver = method(base, contexts=2, **QUICK)
    solver.context_texts = ("the river runs to the sea and " * 2,) * 2  # none fits
    with pytest.warns(UserWarning, match="left out"):
        found = solver.edit([request]).deltas()
    wanted = method(base, contexts=0, **QUICK).edit([request]).deltas()
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-6, atol=1e-9)


def test_a_long_prompt_changes_nothing_of_the_others():
    base = tiny_base("gpt2")
    long, short = long_request(base, 0), REQUESTS[1]
    solver = MEMIT(base, contexts=2, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = list(solver.edit_each([[long], [short]]))
        alone = [solver.edit([long]), solver.edit([short])]
    for one, other in zip(together, alone, strict=True):
        first, second = one.deltas(), other.deltas()
        for name, delta in second.items():
            torch.testing.assert_close(first[name], delta, rtol=1e-6, atol=1e-9)
