"""Requests that cannot hold together: which are found, and what is done about them."""

from __future__ import annotations

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
from kedit_lightning.errors import (
    BaseModelNotFoundError,
    FactsNotWrittenWarning,
    InvalidRequestError,
    UnsupportedUseError,
)
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
    expected = {"single": [["Lyon"], ["Nice"], ["Lille"]]}.get(mode, [["Nice"], ["Lille"]])
    assert written[0] == expected


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
