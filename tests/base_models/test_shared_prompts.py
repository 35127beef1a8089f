"""What follows prompts that are read once is as after complete passes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from support import FAMILIES, REQUESTS, tiny_base
from toys import Toy

from kedit_lightning import BaseModel, Probe
from kedit_lightning.base_models.prefill import prefilling, unchanged_blocks
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.base_models.shared_prompts import SharedPrompts, can_share
from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.begun_answers import BegunAnswers
from kedit_lightning.benchmark.free_texts import carrying
from kedit_lightning.benchmark.reader import Reader
from kedit_lightning.methods import FTM, GRACE, PROMPT

QUESTIONS = ["Where is it?", "Amber Falls lies in", "x", "Marie Curie was born in the town of the"]
ANSWERS = [(0, "Rome"), (3, "Norway, I know"), (2, "Lima"), (0, "B"), (1, "Rome"), (1, "Lima")]


def rows_of(base: BaseModel) -> list[EncodedRow]:
    return [base.encode(QUESTIONS[number], answer) for number, answer in ANSWERS]


def complete(base: BaseModel, rows: list[EncodedRow]) -> list[torch.Tensor]:
    padded = base.pad(rows)
    logits = base.answer_logits(padded)
    return [own[mask] for own, mask in zip(logits, padded.answer_mask, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_behind_shared_prompts_are_those_of_complete_passes(family: str) -> None:
    base = tiny_base(family)
    edits = [Toy(base_model=base).edit([request]) for request in REQUESTS[:3]]
    carried = [edits[0], None, edits[1], edits[2]]
    rows, numbers = rows_of(base), [number for number, _ in ANSWERS]
    with carrying(base, carried):
        assert can_share(base)
        shared = SharedPrompts(base, [base.encode(question) for question in QUESTIONS])
    with carrying(base, [carried[number] for number in numbers]):
        expected = complete(base, rows)
        for _ in range(2):  # the cache is not used up
            tails = shared.tails(rows, numbers)
            logits = base.logits_at(tails.rows, tails.rows.answer_columns, **tails.options)
            for own, mask, other in zip(logits, tails.rows.answer_mask, expected, strict=True):
                torch.testing.assert_close(own[mask], other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_free_answers_go_on_from_some_of_the_prompts(family: str) -> None:
    base = tiny_base(family)
    shared = SharedPrompts(base, [base.encode(question) for question in QUESTIONS])
    for numbers in ([0, 1, 2, 3], [2, 0], [1]):
        prompts = [QUESTIONS[number] for number in numbers]
        some = shared.some(numbers)
        assert some.prompts([base.encode(prompt) for prompt in prompts]) is not None
        answers = base.generate(prompts, 6, prefix_states=some)
        assert answers == base.generate(prompts, 6)
    assert shared.some([0, 1]).prompts([base.encode(QUESTIONS[0])]) is None


def test_edits_that_look_at_prompts_get_complete_passes() -> None:
    base = tiny_base("llama")
    grace = GRACE(base_model=base, steps=1, replacement="prompt")
    for method in (grace, PROMPT(base_model=base)):
        assert can_share(base)
        with method.edit(REQUESTS[:1]):
            assert not can_share(base)
    assert not can_share(tiny_base("t5"))
    assert not can_share(tiny_base("mistral", sliding_window=8))


def test_windows_of_gpt_neo_are_no_full_attention() -> None:
    kinds = [[["global", "local"], 2]]
    base = tiny_base("gpt_neo", torch.float32, attention_types=kinds, window_size=16)
    assert not can_share(base)  # the window is wider than the rows that an architecture is tried on
    assert not Reader(base, Protocol(), "window").prefixes.bears_gaps
    assert can_share(tiny_base("gpt_neo", torch.float32, attention_types=[[["global"], 4]]))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_blocks_below_all_edits_run_once(family: str) -> None:
    base = tiny_base(family)
    prompts, rows = [base.encode(question) for question in QUESTIONS], rows_of(base)
    numbers, count = [number for number, _ in ANSWERS], len(base.layout)
    first = count - 2
    method = FTM(base_model=base, layers=[first], steps=1, lr=0.3)
    edits = [method.edit([request]) for request in REQUESTS[:2]]
    carried = [edits[0], edits[1], None, edits[0]]
    plain, ran = SharedPrompts(base, prompts), list[int]()

    def note(index: int, *_: object) -> None:
        ran.append(index)

    parts = [next(base.module(base.layout.block_name(i)).children()) for i in range(count)]
    handles = [m.register_forward_pre_hook(partial(note, i)) for i, m in enumerate(parts)]
    with carrying(base, carried):
        assert unchanged_blocks(base) == first
        found = [SharedPrompts(base, prompts, plain)]
        assert ran == [first, first + 1]
        found.append(SharedPrompts(base, prompts))
    before = plain.tails(rows, numbers)
    entered, whole = found[0].tails(rows, numbers), found[1].tails(rows, numbers)
    logits = []
    with carrying(base, [carried[number] for number in numbers]):
        with base.edits.suspended(), before.noting(first):
            logits.append(base.logits_at(before.rows, before.rows.answer_columns, **before.options))
        ran.clear()
        for tails, known in ((entered, before), (whole, None)):
            with tails.above(first, known):
                columns = tails.rows.answer_columns
                logits.append(base.logits_at(tails.rows, columns, **tails.options))
    assert ran == [first, first + 1, *range(count)]
    for handle in handles:
        handle.remove()
    assert torch.equal(logits[1], logits[2])
    assert not torch.allclose(logits[1], logits[0])
    for one, other in zip(entered.cache.layers, whole.cache.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@torch.no_grad()
def test_a_prefill_ends_with_the_last_keys_and_values() -> None:
    base, ran = tiny_base("llama"), list[str]()
    inputs = base.pad([base.encode(question) for question in QUESTIONS], "left").inputs
    whole = base.model(**inputs, use_cache=True).past_key_values
    names = [base.layout.block(index).mlp for index in range(len(base.layout))]
    handles = [
        base.module(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in names
    ]
    with prefilling(base, outputs := {}) as prefill:
        prefill.output = base.model(**inputs, **prefill.options)
    cache = prefill.cache
    assert ran == names[:-1]
    assert list(outputs) == [base.layout.block_name(index) for index in range(len(names) - 1)]
    for handle in handles:
        handle.remove()
    for one, other in zip(cache.layers, whole.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
        assert type(one) is type(other)


def test_a_codebook_spares_the_heads_of_prompts() -> None:
    base = tiny_base("llama", torch.float32)
    grace = GRACE(base_model=base, steps=1)
    edits = [grace.edit([request]) for request in REQUESTS[:2]]
    with carrying(base, edits):
        assert base.edits.spares_heads
        assert can_share(base)
    with edits[0], carrying(base, [Toy(base_model=base).edit(REQUESTS[1:2])]):
        assert not base.edits.spares_heads  # the other edit acts on all tokens
        assert not can_share(base)
    assert not base.edits.spares_heads


@pytest.mark.parametrize(
    ("family", "method"), [("gpt2", "toy"), ("llama", "toy"), ("llama", "codebook")]
)
def test_readings_are_those_of_complete_passes(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, protocol = tiny_base(family), Protocol(max_new_tokens=5)
    probes = [
        Probe(kind=kind, prompt=question, answers=("Rome", "Norway"), contrast="Lima")
        for question in QUESTIONS
        for kind in ("rewrite", "locality")
    ]
    requests = REQUESTS[:2]
    if method == "codebook":  # one prompt is that of a fact, and one lies within its radius
        requests = [
            replace(r, prompt=q, subject=None) for r, q in zip(requests, QUESTIONS[:2], strict=True)
        ]
        editor = GRACE(base_model=base, steps=3, lr=0.3, radius=1.0)
    else:
        editor = Toy(base_model=base)
    edits = [editor.edit([request]) for request in requests]
    carried = [edits[i % 2] for i in range(len(probes))]
    found = []
    turned_off = {
        "shared": (),
        "joined": ("prompts_are_shared",),
        "complete": ("prompts_are_shared", "rows_are_joined"),
    }
    for name, functions in turned_off.items():
        for function in functions:
            monkeypatch.setattr(f"kedit_lightning.benchmark.reader.{function}", lambda *_: False)
        reader = Reader(base, protocol, f"{family}-{method}-{name}")
        before = reader.base_readings(probes)
        found.append([*before, *reader.readings(probes, before, carried)])
    for *others, complete_one in zip(*found, strict=True):
        for key, value in complete_one.items():
            floats = isinstance(value, float) or (value and isinstance(value, list | tuple))
            for one in others:
                assert one[key] == (pytest.approx(value, abs=1e-9) if floats else value), key


def test_no_change_is_none_at_all() -> None:
    base = tiny_base("llama", torch.float32)
    probes = [Probe(kind="locality", prompt=question, answers=("Rome",)) for question in QUESTIONS]
    edit = Toy(base_model=base, strength=0.0).edit(REQUESTS[:1])
    reader = Reader(base, Protocol(max_new_tokens=5), "nothing")
    before = reader.base_readings(probes)
    after = reader.readings(probes, before, [edit] * len(probes))
    assert [reading["kl"] for reading in after] == [0.0] * len(probes)


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_free_answers_that_passes_begin_are_those_of_generation(family: str) -> None:
    base = tiny_base(family)
    probes = [
        Probe("locality" if i % 2 else "rewrite", q, ("Rome",)) for i, q in enumerate(QUESTIONS)
    ]
    edits = [Toy(base_model=base).edit([request]) for request in REQUESTS[:2]]
    reader = Reader(base, Protocol(max_new_tokens=7), f"{family}-begun")
    before = reader.base_readings(probes)
    assert [r["text"] for r in before] == base.generate(QUESTIONS, 7, stop_at_sentence=True)
    carried = [edits[0], None, edits[1], edits[0]]
    after = reader.readings(probes, before, carried)
    for edit, question, reading in zip(carried, QUESTIONS, after, strict=True):
        with carrying(base, [edit]):
            (alone,) = base.generate([question], 7, stop_at_sentence=True)
        assert reading["text"] == alone


def test_texts_of_a_long_stream_of_answers_are_not_all_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kedit_lightning.benchmark.begun_answers._TEXTS", 8)
    base = tiny_base("gpt2")
    begun = BegunAnswers(base, Protocol())
    for last in range(20, 60):
        assert begun.text([50, last]) == base.tokenizer.decode([50, last])
        assert len(begun._texts) <= 8


@pytest.fixture
def prompts_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Whether edits acted on each cache of prompts that is made, and the number of its prompts."""
    made: list[tuple[bool, int]] = []
    fill = SharedPrompts.__init__

    def counted(self: SharedPrompts, model: BaseModel, prompts: list[EncodedRow], *known) -> None:
        made.append((model.edits.active, len(prompts)))
        fill(self, model, prompts, *known)

    monkeypatch.setattr(SharedPrompts, "__init__", counted)
    return made


def test_prompts_of_the_base_model_are_read_once(prompts_made: list[tuple[bool, int]]) -> None:
    base = tiny_base("llama")
    probes = [Probe("locality", question, ("Rome",)) for question in QUESTIONS[:2]] * 2
    edits = [Toy(base_model=base).edit([request]) for request in REQUESTS[:2]]
    reader = Reader(base, Protocol(max_new_tokens=3), "once")
    before = reader.base_readings(probes, [0, 0, 1, 1])
    reader.readings(probes, before, [edits[0], edits[0], edits[1], edits[1]])
    assert prompts_made == [(False, 4), (True, 4)]


def test_the_base_model_reads_prompts_again_only_for_what_is_compared(
    prompts_made: list[tuple[bool, int]],
) -> None:
    base = tiny_base("llama")
    words = ["Ada", "Ben", "Cora", "Dan", "Eve", "Finn", "Gil", "Hugo"]
    kinds = ["locality", "rewrite"] * 4
    probes = [Probe(k, f"{w} lives in", ("Rome",)) for k, w in zip(kinds, words, strict=True)]
    reader = Reader(base, Protocol(max_new_tokens=3, score_batch_size=1), "again")
    before = reader.base_readings(probes)
    reader._plain.clear()  # as where many prompts were read since
    prompts_made.clear()
    with Toy(base_model=base).edit(REQUESTS[:1]):
        reader.readings(probes, before)
    assert sum(count for edited, count in prompts_made if edited) == 8
    assert sum(count for edited, count in prompts_made if not edited) == 4
