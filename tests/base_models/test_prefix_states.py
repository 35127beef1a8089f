"""Prompts behind one beginning: read on top of its states, with the results of whole prompts."""

from __future__ import annotations

import pytest
import torch
from support import REQUESTS, tiny_base

from kedit_lightning import BaseModel, Probe
from kedit_lightning.base_models import prefix_states
from kedit_lightning.base_models.prefix_states import PrefixStates
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.reader import Reader
from kedit_lightning.methods import GRACE, IKE, PROMPT, ROME
from kedit_lightning.requests import EditExample

#: Sliding windows shorter than what stands before the questions.
SLIDING = {
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "head_dim": 8, "num_hidden_layers": 6},
}
FAMILIES = {"gpt2": {}, "llama": {}, "gpt_neox": {}, **SLIDING}
QUESTIONS = ["Where is it?", "Amber Falls lies in", "x", "Marie Curie was born in the town of the"]
ANSWERS = ["Rome", "Norway, I know", "Lima", "B"]
each_family = pytest.mark.parametrize("family", FAMILIES)


def model(family, dtype=torch.float64):
    return tiny_base(family, dtype, **FAMILIES.get(family, {}))


def stated(base: BaseModel):
    """An edit that puts a fact before each prompt."""
    return PROMPT(base).edit(REQUESTS[:1])


def encoded(base: BaseModel):
    pairs = zip(QUESTIONS, ANSWERS, strict=True)
    return [base.encode(question, answer) for question, answer in pairs]


class Calls:
    """The number of tokens in each call of a model."""

    def __init__(self, base: BaseModel):
        self.tokens: list[tuple[int, ...]] = []
        self._base = base

    def __enter__(self):
        def note(module, args, kwargs):
            self.tokens.append(tuple(kwargs["input_ids"].shape))

        self._handle = self._base.model.register_forward_pre_hook(note, with_kwargs=True)
        return self.tokens

    def __exit__(self, *error):
        self._handle.remove()


@each_family
@torch.no_grad()
def test_answers_are_those_of_whole_prompts_and_the_beginning_is_read_once(family):
    base = model(family)
    states = PrefixStates(base)
    with stated(base):
        rows = encoded(base)
        whole = base.answer_logits(base.pad(rows))
        shared = states.shared(rows)
        shortest = min(len(row.prompt) for row in rows)
        assert 16 <= shared < shortest
        with Calls(base) as tokens:
            read, logits = states.answer_logits(rows)
            again = states.answer_logits(rows[::-1])[1].flip(0)
        # The last token of an answer predicts none.
        longest = max(len(row.prompt) + len(row.answer) - 1 for row in rows)
        assert tokens == [(1, shared), (4, longest - shared), (4, longest - shared)]
        assert torch.equal(read.answer_ids, base.pad(rows).answer_ids)
        mask = read.answer_mask[..., None]
        torch.testing.assert_close(logits * mask, whole * mask, rtol=0, atol=1e-9)
        torch.testing.assert_close(again * mask, whole * mask, rtol=0, atol=1e-9)
        # One row by itself goes on from what is known.
        with Calls(base) as tokens:
            alone = states.answer_logits(rows[1:2])[1]
        assert tokens == [(1, len(rows[1].prompt) + len(rows[1].answer) - 1 - shared)]
        torch.testing.assert_close(alone[0], whole[1, : alone.shape[1]], rtol=0, atol=1e-9)


@each_family
def test_generation_is_that_of_whole_prompts_whatever_their_lengths(family):
    base = model(family)
    with stated(base):
        whole = base.generate(QUESTIONS, max_new_tokens=5)
        states = PrefixStates(base)
        for size in (1, 2, 4):
            found = base.generate(QUESTIONS, 5, size, prefix_states=states)
            assert found == whole
        with Calls(base) as tokens:
            base.generate(QUESTIONS, max_new_tokens=5, prefix_states=PrefixStates(base))
        widths = [columns for _, columns in tokens if columns > 1]
        assert (widths[-1] >= 16) == (family in SLIDING), "read whole where a window slides"
        equal = [QUESTIONS[0], QUESTIONS[0]]
        with Calls(base) as tokens:
            base.generate(equal, max_new_tokens=2, prefix_states=PrefixStates(base))
        assert sum(columns > 16 for _, columns in tokens) == 1
        options = {"num_beams": 3, "max_new_tokens": 4}
        beams = base.generate(QUESTIONS, **options)
        assert base.generate(QUESTIONS, **options, prefix_states=states) == beams


@pytest.mark.filterwarnings("ignore:.*was computed on top of")
@torch.no_grad()
def test_another_stack_or_beginning_is_computed_anew():
    base = model("llama")
    states = PrefixStates(base)
    rome = ROME(base, statistics="identity", contexts=2, steps=4).edit(REQUESTS[1:2])
    for edits in ((stated(base),), (IKE(base, demonstrations=0).edit(REQUESTS[3:4]),)):
        for edit in edits:
            with edit:
                rows = encoded(base)
                for _ in range(2):
                    whole = base.answer_logits(base.pad(rows))
                    found = states.answer_logits(rows)[1]
                    mask = base.pad(rows).answer_mask[..., None]
                    torch.testing.assert_close(found * mask, whole * mask, rtol=0, atol=1e-9)
    with stated(base), rome:
        whole = base.answer_logits(base.pad(rows := encoded(base)))
        found = states.answer_logits(rows)[1]
        mask = base.pad(rows).answer_mask[..., None]
        torch.testing.assert_close(found * mask, whole * mask, rtol=0, atol=1e-9)


@torch.no_grad()
def test_where_it_does_not_pay_or_rows_are_looked_at_prompts_are_read_whole():
    base = model("llama")
    states = PrefixStates(base)
    rows = [EncodedRow((1, *range(10, 40), last), (5,)) for last in (50, 60)]
    assert states.shared(rows) == 0  # no edit of prompts
    with stated(base):
        assert states.shared(rows) == 31
        assert states.shared([rows[0], EncodedRow((1, *range(10, 20)), (5,))]) == 0
        assert states.shared(rows[:1]) == 0
        assert states.shared([*rows, EncodedRow((1, 2, *rows[0].prompt), (5,))]) == 0
        with base.edits.suspended():
            assert states.shared(rows) == 0
        with GRACE(base, steps=2).edit(REQUESTS[1:2]):
            assert states.shared(rows) == 0
    for family in ("mamba", "t5"):
        other = tiny_base(family)
        with stated(other):
            assert PrefixStates(other).shared(rows) == 0


def test_readings_of_a_run_are_the_same_and_take_fewer_tokens(monkeypatch):
    base = model("llama", torch.float32)
    probes = [
        Probe("rewrite", QUESTIONS[0], (ANSWERS[0],), contrast="Lima"),
        Probe("rephrase", QUESTIONS[1], (ANSWERS[1],)),
        Probe("locality", QUESTIONS[3], (ANSWERS[3],), "near"),
        Probe("locality", QUESTIONS[2], (), "near"),
    ]
    pool = [EditExample.from_request(request, request.id) for request in REQUESTS[1:]]
    edit = IKE(base, pool=pool, demonstrations=2).edit(REQUESTS[:1])

    def readings():
        reader = Reader(base, Protocol(max_new_tokens=4))
        before = reader.base_readings(probes)
        with edit, Calls(base) as tokens:
            found = reader.readings(probes, before)
        return found, sum(rows * columns for rows, columns in tokens)

    reused, fewer = readings()
    monkeypatch.setattr(prefix_states, "SHORTEST", 10_000)
    whole, more = readings()
    assert fewer < 0.7 * more
    for one, other in zip(reused, whole, strict=True):
        for name, value in one.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[name], abs=1e-5)
            else:
                assert value == other[name]
