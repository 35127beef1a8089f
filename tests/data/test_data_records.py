"""What a record may hold: keys once, known keys, names of two types, text that UTF-8 can hold."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from data_support import complaint, fact, write

from kedit_lightning.data import CounterFact, Requests, Texts, ZsRE
from kedit_lightning.errors import DataFileError
from kedit_lightning.runs.prompts import read_prompts

PROBE = {"prompt": "Rome is in", "answers": ["Italy"]}


# ---- probes


@pytest.mark.parametrize("kind", ["locality", "portability"])
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("ground_truth", "answers"),
        ("answer", "answers"),
        ("Answers", "answers"),
        ("answrs", "answers"),
        ("question", "prompt"),
        ("note", None),
    ],
)
def test_keys_of_a_probe_that_are_not_read(
    tmp_path: Path, kind: str, key: str, meant: str | None
) -> None:
    message = complaint(
        write(tmp_path / "f.jsonl", fact(**{kind: {"near": [PROBE, {**PROBE, key: "x"}]}}))
    )
    named = f"field '{kind}.near[1].{key}'" + (f" (was '{meant}' meant?)" if meant else "")
    assert f"{named} is not read; fields here are prompt, messages, answers" in message


def test_a_constraint_is_read_whole(tmp_path: Path) -> None:
    kept = {"prompt": "Snow is", "answer": "white"}
    (example,) = Requests(path=write(tmp_path / "f.jsonl", fact(constraint=kept))).examples()
    request = example.requests[0]
    assert (request.constraint_prompt, request.constraint_answer) == ("Snow is", "white")
    for damaged, named in (
        ({"prompt": "Snow is"}, "'constraint.answer' is missing"),
        ({**kept, "answers": "x"}, "'constraint.answers'.*fields here are prompt, answer"),
        ("Snow is white", "'constraint' must be an object"),
    ):
        assert re.search(named, complaint(write(tmp_path / "f.jsonl", fact(constraint=damaged))))


# ---- keys that stand twice


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('{"prompt": "p", "target_new": "a", "target_new": "b"}', "target_new"),
        ('{"prompt": "p", "prompt": "p", "target_new": "a"}', "prompt"),
        ('{"prompt": "p", "target_new": "a", "locality": {"n": [], "n": []}}', "locality.n"),
        (
            '{"prompt": "p", "target_new": "a", "locality": {"n": [{"prompt": "q", "answers": "x", '
            '"answers": "y"}]}}',
            "locality.n[0].answers",
        ),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_json_key_given_twice(tmp_path: Path, line: str, field: str, form: str) -> None:
    path = tmp_path / f"f.{form}"
    lines = [json.dumps(fact()), line]
    path.write_text("\n".join(lines) if form == "jsonl" else f"[{', '.join(lines)}]")
    place = "line 2" if form == "jsonl" else "index 1"
    assert f"f.{form} {place}: field '{field}' stands there twice" in complaint(path)
    with pytest.warns(UserWarning, match="1 of 2 records"):
        assert len(Requests(path=path, on_bad_record="skip").examples()) == 1


def test_a_csv_column_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text("prompt,target_new, prompt,,\nRome is in,Chile,Lima is in,,\n")
    assert "f.csv line 1 has the column 'prompt' twice" in complaint(path)
    path.write_text("prompt,target_new,,\nRome is in,Chile,,\n")
    assert len(Requests(path=path).examples()) == 1


def test_a_key_given_twice_in_a_text_for_statistics(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "text": "b"}\n')
    with pytest.raises(DataFileError, match=r"t\.jsonl line 1: field 'text' stands there twice"):
        Texts(path=path).setup()


# ---- names


@pytest.mark.parametrize("name", [1.5, 7.0, True, ["a"], {"a": 1}, "", " "])
def test_names_of_other_types(tmp_path: Path, name: Any) -> None:
    message = complaint(write(tmp_path / "f.jsonl", fact(), fact(id=name)))
    assert f"'id' must be text or a whole number, or absent, got {name!r}" in message


def test_a_published_name_of_another_type(tmp_path: Path) -> None:
    record = {"case_id": 1.5, "prompt": "Rome is in", "target_new": "Chile"}
    assert "'case_id' must be text or a whole" in complaint(
        write(tmp_path / "f.jsonl", record), CounterFact
    )


def test_names_that_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", fact(id=7), fact(id="x "), fact(id=None), fact())
    assert [e.id for e in Requests(path=path).examples()] == ["7", "x", "2", "3"]


# ---- text that is no UTF-8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "Rome \ud800 is in"),
        ("target_new", "\udfff"),
        ("rephrases", ["where?", "\ud83d"]),
        ("id", "\udcff"),
        ("locality", {"near": [{"prompt": "\ud800"}]}),
    ],
)
def test_halves_of_surrogate_pairs(tmp_path: Path, field: str, value: Any) -> None:
    record = fact(**{field: value}) | ({"subject": None} if field == "prompt" else {})
    path = write(tmp_path / "f.jsonl", fact(), record)
    message = complaint(path)
    place = {"rephrases": "rephrases[1]", "locality": "locality.near[0].prompt"}.get(field, field)
    assert "f.jsonl line 2" in message
    assert f"field '{place}'" in message
    assert "UTF-8" in message
    message.encode()  # it can be printed
    with pytest.warns(UserWarning, match="1 of 2 records"):
        assert len(Requests(path=path, on_bad_record="skip").examples()) == 1


def test_a_file_in_another_encoding_is_refused_by_record_and_field(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    text = "prompt,target_new\nRome is in,Chile\nThe caf\u00e9 is in,Chile\nRome is in,Per\u00fa\n"
    path.write_bytes(text.encode("latin-1"))
    message = complaint(path)
    assert "f.csv has 2 bad records of 3" in message
    assert "line 3: field 'prompt' is not UTF-8 text" in message
    assert "line 4: field 'target_new' is not UTF-8 text" in message


def test_other_texts_that_are_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "\\ud800"}\n')
    with pytest.raises(DataFileError, match="field 'text' holds halves of surrogate pairs"):
        Texts(path=path).setup()
    path.write_text('"\\ud800"\n')
    with pytest.raises(DataFileError, match="entry 0 holds what is no character"):
        read_prompts(path)
    (tmp_path / "p.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataFileError, match=r"not UTF-8 text .byte 3."):
        read_prompts(tmp_path / "p.txt")


# ---- white space


def test_white_space_is_counted_once_for_a_file(tmp_path: Path) -> None:
    probes = {"near": [{"prompt": "Rome is in", "answers": ["Italy ", "IT"]}]}
    path = write(
        tmp_path / "f.jsonl",
        fact(target_new="Norway ", target_old="\tChile", rephrases=[" Where?"], locality=probes),
        fact(target_new="Peru\u00a0", id="b", prompt="Amber Falls is at"),
    )
    data = Requests(path=path)
    with pytest.warns(UserWarning, match="white space") as caught:
        first, second = data.examples()
    data.examples()
    assert [str(w.message) for w in caught] == [
        "f.jsonl: white space was dropped at the edges of target_new (2), target_old (1), "
        "prompt of rephrase probes (1), answers of locality probes (1)"
    ]
    assert (first.requests[0].target_new, first.requests[0].target_old) == ("Norway", "Chile")
    assert [(p.prompt, p.answers, p.contrast) for p in first.probes] == [
        ("Amber Falls lies in", ("Norway",), "Chile"),
        ("Where?", ("Norway",), "Chile"),
        ("Rome is in", ("Italy", "IT"), None),
    ]
    assert second.requests[0].target_new == "Peru"


def test_white_space_of_a_single_fact_and_of_cells(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"the fact given: .* target_new \(1\)"):
        Requests(prompt="Rome is in", target_new="Chile ").examples()
    path = tmp_path / "f.csv"
    path.write_text('prompt,target_new\nRome is in, Chile\nLima is in,"Peru\n"\n')
    with pytest.warns(UserWarning, match=r"f.csv: .* target_new \(2\)"):
        examples = Requests(path=path).examples()
    assert [e.requests[0].target_new for e in examples] == ["Chile", "Peru"]


def test_nothing_is_said_where_nothing_was_dropped(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Requests(path=write(tmp_path / "f.jsonl", fact(prompt="Amber Falls is in "))).examples()


def test_white_space_of_published_files_is_counted_where_it_stands(tmp_path: Path) -> None:
    record = {"src": "Rome is in", "alt": "Chile ", "answers": ["Italy "], "rephrase": "Rome?"}
    path = write(tmp_path / "z.jsonl", record)
    with pytest.warns(UserWarning, match=r"edges of target_new \(1\), target_old \(1\)$"):
        (example,) = ZsRE(path=path).examples()
    assert {p.answers for p in example.probes} == {("Chile",)}
    texts = {"target_new": {"str": "Chile "}, "target_true": {"str": " Italy"}}
    rewrite = {"prompt": "{} is in", "subject": "Rome", **texts}
    write(path, {"requested_rewrite": rewrite, "neighborhood_prompts": ["Milan is in"]})
    with pytest.warns(UserWarning, match=r"edges of target_new \(1\), target_old \(1\)$"):
        (example,) = CounterFact(path=path).examples()
    assert [(p.answers, p.contrast) for p in example.probes] == [
        (("Chile",), "Italy"),
        (("Italy",), "Chile"),
    ]


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rome is in"}]


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_prompts_of_a_file_may_be_messages(name, tmp_path):
    entries = ["Lyon is in", CHAT, {"prompt": "Bern is in"}, {"messages": CHAT}, {"prompt": CHAT}]
    lines = [json.dumps(entry) for entry in entries]
    text = "\n".join(lines) if name == "p.jsonl" else f"[{', '.join(lines)}]"
    (tmp_path / name).write_text(text)
    turns = json.dumps(CHAT)
    assert read_prompts(tmp_path / name) == ["Lyon is in", turns, "Bern is in", turns, turns]


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ([{"role": "user"}], "message 0 of a prompt must be an object"),
        ({"messages": CHAT, "prompt": "Rome"}, "two forms of one thing"),
        ({"messages": "Rome"}, "must be a list of objects"),
        ({"question": "Rome"}, "field 'prompt' is missing"),
        (7, "must be a text or a list of messages"),
        (" ", "but empty"),
    ],
)
def test_an_entry_that_is_no_prompt_is_named_with_what_one_is(entry, named, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(["Rome is in", entry]))
    with pytest.raises(DataFileError, match=named) as caught:
        read_prompts(tmp_path / "p.json")
    assert "entry 1" in str(caught.value)
    assert "lists of messages with role and content" in str(caught.value)


def test_a_rephrase_may_be_messages(tmp_path):
    record = {"prompt": "Rome is in", "target_new": "France", "rephrases": ["Rome lies in", CHAT]}
    (tmp_path / "facts.json").write_text(json.dumps([record]))
    (example,) = Requests(path=tmp_path / "facts.json").examples()
    prompts = [probe.prompt for probe in example.probes if probe.kind == "rephrase"]
    assert prompts == ["Rome lies in", json.dumps(CHAT)]
    record["rephrases"] = [[{"role": "user"}]]
    (tmp_path / "facts.json").write_text(json.dumps([record]))
    with pytest.raises(DataFileError, match=r"field 'rephrases\[0\]': message 0 of a prompt"):
        Requests(path=tmp_path / "facts.json").examples()
