"""Requests that cannot hold together: which are found, and what is done about them."""

from __future__ import annotations

import json
import unicodedata
import warnings
from pathlib import Path

import pytest
from data_support import fact, write
from support import tiny_base
from toys import Toy

from kedit_lightning import EditRequest, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.contradictions import consistent, contradictions, settle
from kedit_lightning.data import Requests
from kedit_lightning.edits.edit_file import read_edit
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.errors import (
    BaseModelNotFoundError,
    FactsNotWrittenWarning,
    InvalidRequestError,
    UnsupportedUseError,
)
from kedit_lightning.methods.method import Capabilities
from kedit_lightning.requests import EditExample

FRANCE = "The capital of France is"


def capital(prompt: str, target: str, subject: str | None = "France", **more: str) -> EditRequest:
    return EditRequest(prompt, target, subject, **more)


def pairs(*requests: EditRequest) -> list[tuple[int, int]]:
    return [tuple(pair) for pair in contradictions(requests)]


@pytest.mark.parametrize(
    "prompt",
    [
        FRANCE,
        "the capital  of\u00a0france is ",
        "France's capital is",
        "France\u2019s capital is:",
        "What is the capital of France?",
        "The capital of France:",
        "The capital of \uff26rance is",
    ],
)
def test_wordings_of_one_fact_with_two_answers(prompt: str) -> None:
    subject = "France" if "France" in prompt else None
    first, second = capital(FRANCE, "Lyon"), capital(prompt, "Nice", subject)
    assert pairs(first, second) == [(0, 1)]
    assert pairs(first, capital(prompt, "LYON ", subject)) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("France is the capital of", FRANCE),
        ("France's president is", FRANCE),
        ("The president of France was", "The president of France is"),
        ("The team that France beat is", "The team that beat France is"),
        ("France is in", "France is"),
    ],
)
def test_other_facts_about_one_subject_are_none(one: str, other: str) -> None:
    assert pairs(capital(one, "Lyon"), capital(other, "Nice")) == []


def test_one_fact_told_by_task_and_old_target() -> None:
    told = {"task": "P36", "target_old": "Paris"}
    one = capital("In France the government sits in", "Lyon", **told)
    assert pairs(one, capital(FRANCE, "Nice", **told)) == [(0, 1)]
    assert pairs(one, capital(FRANCE, "Nice", task="P36")) == []
    assert pairs(one, capital(FRANCE, "Nice", task="P36", target_old="Vichy")) == []


def test_forms_of_one_answer_are_no_contradiction() -> None:
    answer = "S\u00e3o Paulo"
    assert (
        pairs(capital(FRANCE, answer), capital(FRANCE, unicodedata.normalize("NFD", answer))) == []
    )


def test_only_the_last_answer_stays() -> None:
    answers = ["Lyon", "Nice", "Lyon", "Lille", "lille"]
    requests = [capital(FRANCE, answer) for answer in answers]
    assert pairs(*requests) == [(0, 1), (1, 2), (2, 3)]
    assert [r.target_new for r in consistent(requests)] == ["Lille", "lille"]
    assert consistent(consistent(requests)) == consistent(requests)
    other = EditRequest("The capital of Italy is", "Turin", "Italy")
    assert settle([other, *requests[:2]], "last") == [other, requests[1]]


def test_a_method_writes_the_last_answer_and_says_so() -> None:
    method = Toy(base_model=tiny_base("gpt2"))
    requests = [capital(FRANCE, "Lyon", id="a"), capital(FRANCE, "Nice", id="b")]
    with pytest.warns(UserWarning, match=r"'Lyon' \(record 'a'\) and 'Nice' \(record 'b'\); the l"):
        edit = method.edit(requests)
    assert edit.origin.requests == (requests[1],)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FactsNotWrittenWarning)
        assert method.edit(requests[1:]).id == edit.id
    with pytest.raises(InvalidRequestError, match="1 prompt with contradictory targets: 'The cap"):
        method.edit(requests, on_conflict="refuse")
    with pytest.raises(UnsupportedUseError, match="on_conflict must be last or refuse"):
        method.edit(requests, on_conflict="first")  # type: ignore[arg-type]


def test_white_space_is_said_once_with_a_count() -> None:
    requests = [capital(FRANCE, "Lyon "), EditRequest("Rome is in", "\tSpain", "Rome ")]
    with pytest.warns(UserWarning, match=r"edges of target_new \(2\), subject \(1\)") as caught:
        edit = Toy(base_model=tiny_base("gpt2")).edit(requests)
    assert [w.category for w in caught] == [UserWarning, FactsNotWrittenWarning]
    assert [r.target_new for r in edit.origin.requests] == ["Lyon", "Spain"]


@pytest.mark.parametrize(
    ("mode", "sizes"), [("single", [1, 1, 1]), ("batch", [2, 1]), ("sequential", [3])]
)
def test_a_protocol_says_which_requests_hold_together(mode: str, sizes: list[int]) -> None:
    examples = [EditExample((capital(FRANCE, str(i)),), (), str(i)) for i in range(3)]
    protocol = Protocol(mode=mode, chunk_size=2)  # type: ignore[arg-type]
    assert [len(group) for group in protocol.written_together(examples)] == sizes
    assert list(protocol.written_together([])) == []


def test_what_is_done_about_conflicts_is_checked_and_changes_no_protocol() -> None:
    assert Protocol(on_conflict="refuse").id == Protocol().id
    with pytest.raises(UnsupportedUseError, match="on_conflict must be one of last, refuse"):
        Protocol(on_conflict="first")  # type: ignore[arg-type]


def facts(folder: Path) -> Requests:
    answers = ["Lyon", "Nice", "Lille"]
    return Requests(path=write(folder / "f.jsonl", *[fact(target_new=a) for a in answers]))


@pytest.mark.filterwarnings("ignore:.*contradictory targets")
@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_a_run_writes_the_last_answer_and_can_be_continued(tmp_path: Path, mode: str) -> None:
    protocol = Protocol(mode=mode, chunk_size=2, max_new_tokens=2)  # type: ignore[arg-type]
    written = []
    for again in ({"output": tmp_path / "run"}, {"resume": tmp_path / "run"}):
        method = Toy(base_model=tiny_base("gpt2"))
        trainer = EditTrainer(protocol=protocol, accelerator="cpu", enable_progress_bar=False)
        edits = trainer.edit(method, facts(tmp_path), **again)  # type: ignore[arg-type]
        written.append([[r.target_new for r in edit.origin.requests] for edit in edits])
    # In `single` each has an edit of its own, and nothing is written together.
    assert written[0] == ([["Lyon"], ["Nice"], ["Lille"]] if mode == "single" else [["Lille"]])


@pytest.mark.filterwarnings("ignore:.*contradictory targets")
@pytest.mark.parametrize(("mode", "refused"), [("single", 0), ("batch", 1), ("sequential", 1)])
def test_a_run_refuses_contradictions_before_the_model_is_loaded(
    tmp_path: Path, mode: str, refused: int
) -> None:
    protocol = Protocol(mode=mode, chunk_size=2, on_conflict="refuse")  # type: ignore[arg-type]
    trainer = EditTrainer(protocol=protocol, accelerator="cpu")
    error = InvalidRequestError if refused else BaseModelNotFoundError
    with pytest.raises(error, match="contradictory targets" if refused else "no such model"):
        trainer.test(Toy(base_model="no such model"), facts(tmp_path))


@pytest.mark.filterwarnings("ignore:.*contradictory targets")
def test_only_a_sequence_of_a_benchmark_writes_what_a_later_chunk_corrects(tmp_path: Path) -> None:
    class OneByOne(Toy):
        can = Capabilities(batch=False, weights=True)

    written = {}
    for command in ("edit", "test"):
        protocol = Protocol(mode=None if command == "edit" else "sequential", generate=False)
        trainer = EditTrainer(protocol=protocol, accelerator="cpu", enable_progress_bar=False)
        folder = tmp_path / command
        getattr(trainer, command)(
            OneByOne(base_model=tiny_base("gpt2")), facts(tmp_path), output=folder
        )
        paths = sorted((folder / "edits").iterdir())
        origins = [EditOrigin.from_json(read_edit(path)[0]["origin"]) for path in paths]
        written[command] = [request.target_new for o in origins for request in o.requests]
        records = (folder / "results.jsonl").read_text().splitlines()
        scored = [json.loads(record)["probes"][0]["answers"] for record in records]
        assert scored[-3:] == [["Lyon"], ["Nice"], ["Lille"]], "all are scored"
    assert written == {"edit": ["Lille"], "test": ["Lyon", "Nice", "Lille"]}


@pytest.mark.filterwarnings("ignore:.*contradictory targets")
def test_a_run_that_ended_early_leaves_out_the_same_facts_when_it_goes_on(tmp_path: Path) -> None:
    def edit(**where: Path) -> None:
        protocol = Protocol(mode="sequential", generate=False)
        trainer = EditTrainer(protocol=protocol, accelerator="cpu", enable_progress_bar=False)
        trainer.edit(Toy(base_model=tiny_base("gpt2")), data, **where)  # type: ignore[arg-type]

    answers = {"a": "Lyon", "b": "Nice", "c": "Lille"}
    lines = [fact(id=id, target_new=answer) for id, answer in answers.items()]
    data = Requests(path=write(tmp_path / "f.jsonl", *lines))
    edit(output=tmp_path / "run")
    # Another file with the same records, so that scored ones are compared.
    data = Requests(path=write(tmp_path / "g.jsonl", "", *lines))
    edit(resume=tmp_path / "run")
    entry = json.loads((tmp_path / "run/stack.json").read_text())["edits"]
    assert [edit["requests"] for edit in entry] == [["c"]]


@pytest.mark.filterwarnings("ignore:.*(contradictory targets|are left out)")
@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_a_record_left_out_for_its_length_contradicts_none(tmp_path: Path, mode: str) -> None:
    long = "Lyon" + " Lyon" * 400
    path = write(tmp_path / "f.jsonl", fact(target_new=long), fact(), fact(target_new="Rome"))
    for count in (2, 3):
        protocol = Protocol(mode=mode, chunk_size=2, on_conflict="refuse", generate=False)  # type: ignore[arg-type]
        trainer = EditTrainer(protocol=protocol, accelerator="cpu", enable_progress_bar=False)
        data = Requests(path=path, limit=count, on_bad_record="skip")
        method = Toy(base_model=tiny_base("gpt2"))
        if count == 2:
            trainer.test(method, data, verbose=False)
            continue
        with pytest.raises(InvalidRequestError, match="with contradictory targets") as caught:
            trainer.test(method, data, verbose=False)
        assert "Lyon" not in str(caught.value)
