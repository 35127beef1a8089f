"""Prompts given as messages: one text everywhere, turns where the model reads them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from support import chat_tokenizer, tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel, Edit, EditExample, EditRequest, EditTrainer, Probe
from kedit_lightning.base_models.rows import RowEncoder
from kedit_lightning.chat_turns import (
    messages_in,
    passage_with,
    prompt_text,
    put_before,
    question_in,
)
from kedit_lightning.data import Requests
from kedit_lightning.edits import PromptEdit, PromptEntry
from kedit_lightning.errors import InvalidRequestError, KEditError, UnsupportedUseError
from kedit_lightning.methods import FTM, ROME

TURNS = [
    {"role": "system", "content": "Answer with a city."},
    {"role": "user", "content": 'The "Eiffel Tower"\nis in'},
]
LONG = [
    *TURNS,
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "Marie Curie was born in"},
]
BEGUN = [*TURNS, {"role": "assistant", "content": "It is in the city of"}]
RENDERED = (
    '<s><system>Answer with a city.</system><user>The "Eiffel Tower"\nis in</user><assistant>'
)


@pytest.fixture
def base() -> BaseModel:
    return BaseModel(tiny_model("llama"), chat_tokenizer(True), name="llama")


def request(**fields: str) -> EditRequest:
    return EditRequest(prompt=TURNS, target_new="Rome", subject="Eiffel Tower", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("turns", [TURNS, LONG, BEGUN])
def test_messages_and_their_text_are_one_prompt(turns):
    text = prompt_text(turns)
    assert list(messages_in(text)) == turns
    assert prompt_text(text) == text
    assert prompt_text(json.dumps(turns, indent=1)) == text, "one spelling"
    assert prompt_text([dict(reversed(turn.items())) for turn in turns]) == text
    assert EditRequest(turns, "Rome") == EditRequest(text, "Rome")
    assert hash(Probe("rewrite", turns, ("Rome",))) == hash(Probe("rewrite", text, ("Rome",)))


@pytest.mark.parametrize(
    "text",
    [
        "The capital is",
        "[1] Rome is in",
        "[]",
        '["Rome"]',
        '[{"role": "user"}]',
        '[{"role": "user", "content": "a", "name": "b"}]',
        '[{"role": "user", "content": 3}]',
        '{"role": "user", "content": "a"}',
        "[" * 2000,
    ],
)
def test_other_texts_are_themselves(text):
    assert messages_in(text) is None
    assert prompt_text(text) == question_in(text) == text
    assert put_before("Now. ", text) == "Now. " + text


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([], "text or a list of messages"),
        ([{"role": "user"}], "message 0 of a prompt"),
        ([*TURNS, {"role": "user", "content": " "}], "message 2 of a prompt"),
        ([*TURNS, "Rome"], "message 2"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "'content'"),
    ],
)
def test_what_are_no_messages_is_refused(turns, says):
    with pytest.raises(InvalidRequestError, match=says):
        EditRequest(turns, "Rome")


def test_what_is_asked_and_where_a_part_stands():
    long, begun = prompt_text(LONG), prompt_text(BEGUN)
    assert question_in(long) == "Marie Curie was born in"
    assert question_in(begun) == TURNS[1]["content"]
    assert passage_with(long, "Eiffel Tower") == TURNS[1]["content"]
    assert passage_with(begun, "city") == "It is in the city of"
    assert messages_in(put_before("Now. ", begun))[1]["content"].startswith('Now. The "Eiffel')
    assert put_before("", begun) == begun


def test_a_subject_is_that_of_a_turn():
    assert request().label == f"request {TURNS[1]['content']!r}"
    with pytest.raises(InvalidRequestError, match=r"'Berlin'.* does not occur"):
        replace(request(), subject="Berlin")


# ---- rows


def test_turns_are_put_into_the_template(base):
    row = base.encode(TURNS, "Rome", "Eiffel Tower")
    assert base.tokenizer.decode(row.prompt) == RENDERED
    assert base.tokenizer.decode(row.answer) == "Rome"
    assert row.prompt.count(1) == 1
    subject = row.prompt[row.subject_start : row.subject_end + 1]
    assert "Eiffel Tower" in base.tokenizer.decode(subject)
    assert base.encode(prompt_text(TURNS), "Rome", "Eiffel Tower") == row
    switched = BaseModel(base.model, base.tokenizer, chat=True)
    assert switched.encode(TURNS, "Rome", "Eiffel Tower") == row
    assert base.encoder.count_prompt(prompt_text(TURNS)) == len(row.prompt)
    assert base.encode("Rome is in").prompt[0] == 1, "other prompts are plain"


def test_the_last_turn_may_begin_the_answer(base):
    row = base.encode(BEGUN, "Rome")
    assert base.tokenizer.decode(row.prompt) == RENDERED + "It is in the city of"
    assert base.tokenizer.decode(row.answer) == " Rome"


def test_a_subject_of_an_earlier_turn_is_found(base):
    row = base.encode(LONG, "Warsaw", "Eiffel Tower")
    upto = base.tokenizer.decode(row.prompt[: row.subject_end + 1])
    assert upto.endswith("Eiffel Tower")


def test_a_tokenizer_without_a_template_is_named():
    with pytest.raises(UnsupportedUseError, match="no chat template"):
        RowEncoder(tiny_tokenizer(True)).encode(prompt_text(TURNS))
    with pytest.raises(UnsupportedUseError, match="no chat template"):
        RowEncoder(tiny_tokenizer(True), chat=True).encode("Rome is in")


def test_what_a_template_refuses_is_said(base):
    base.tokenizer.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(InvalidRequestError, match=r"system, user.*no system turns here"):
        base.encode(TURNS)


def test_texts_of_a_corpus_are_no_turns(base):
    text = prompt_text(TURNS)
    assert base.tokenizer.decode(base.encoder.text(text).prompt[1:]) == text


# ---- edits


def test_contexts_and_facts_go_before_the_question(base):
    edit = PromptEdit(base, [PromptEntry(prompt_text(TURNS), "Fact: Rome. ")])
    with edit:
        text = base.tokenizer.decode(base.encode(TURNS).prompt)
    assert text == RENDERED.replace("<user>", "<user>Fact: Rome. ")


def test_an_edit_of_a_chat_is_saved_and_loaded_with_its_request(base, tmp_path):
    edit = FTM(base, steps=3).edit([request(target_old="Paris")])
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors", base)
    assert loaded.id == edit.id
    (saved,) = loaded.origin.requests
    values = saved if isinstance(saved, dict) else asdict(saved)
    assert list(messages_in(values["prompt"])) == TURNS
    with loaded:
        assert base.edits.active


def test_a_locating_method_edits_a_chat(base):
    rows = base.rows([prompt_text(TURNS)], ["Rome"])
    before = base.answer_log_probs(rows).sum()
    with ROME(base, statistics="identity", contexts=2, steps=5).edit([request()]):
        assert base.answer_log_probs(rows).sum() > before + 1e-3


# ---- files


def test_a_file_holds_messages(base, tmp_path):
    record = {
        "messages": TURNS,
        "target_new": "Rome",
        "subject": "Eiffel Tower",
        "locality": {"others": [{"messages": LONG}, {"prompt": "Rome is in"}]},
        "portability": {"hop": [{"prompt": BEGUN, "answers": ["Italy"]}]},
    }
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(record))
    (example,) = Requests(path=path).examples()
    assert example.requests[0].prompt == prompt_text(TURNS)
    prompts = {probe.kind: probe.prompt for probe in example.probes}
    assert prompts["rewrite"] == prompt_text(TURNS)
    assert prompts["portability"] == prompt_text(BEGUN)
    trainer = EditTrainer(logger=False, enable_progress_bar=False)
    (scores,) = trainer.test(FTM(base, steps=2), Requests(path=path), verbose=False)
    assert scores["rewrite/gen_em"] >= 0.0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": TURNS, "prompt": "Rome is"}, "two forms of one thing"),
        ({"messages": "Rome is in"}, "field 'messages' must be a list of objects"),
        ({"messages": [{"role": "user"}]}, "field 'messages': message 0"),
        ({"prompt": ["Rome is in"]}, "field 'prompt': message 0"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, fields, says):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"target_new": "Rome", **fields}]))
    with pytest.raises(KEditError, match=says):
        Requests(path=path).examples()


def test_a_cell_of_a_table_holds_messages(tmp_path):
    path = tmp_path / "facts.tsv"
    cell = json.dumps(LONG).replace('"', '""')
    path.write_text(f'messages\ttarget_new\n"{cell}"\tWarsaw\n')
    (example,) = Requests(path=path).examples()
    assert example.requests[0].prompt == prompt_text(LONG)


def test_an_example_keeps_its_messages():
    example = EditExample.from_request(request(), "0")
    values = json.loads(json.dumps(example.to_json()))
    assert EditRequest(**values["requests"][0]) == request()
