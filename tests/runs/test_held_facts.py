"""`edit` writes facts so that they hold together, and says in the end how many do."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support import tiny_base
from toys import Toy

from kedit_lightning import EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.cli.main import main
from kedit_lightning.data import Requests
from kedit_lightning.errors import (
    EditOrderError,
    FactsNotWrittenError,
    FactsNotWrittenWarning,
    ResumeError,
)
from kedit_lightning.methods.method import Capabilities
from kedit_lightning.runs.held_facts import HeldFacts

TARGET = "Norway"  # one token, which is what the toy can write
PROMPTS = ("Amber Falls lies in", "The Bolt river flows through", "The capital of Peru is in")


class OneByOne(Toy):
    """Writes one fact at a time."""

    can: ClassVar[Capabilities] = Capabilities(batch=False, adapter=True, weights=True)


@pytest.fixture
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facts") / "facts.json"
    path.write_text(json.dumps([{"prompt": p, "target_new": TARGET} for p in PROMPTS]))
    return path


def edit(
    facts: Path, folder: Path | None, kind: type[Toy] = Toy, resume: bool = False, **settings: Any
) -> Any:
    protocol = Protocol(max_new_tokens=4, **settings.pop("protocol", {}))
    strict, limit = settings.pop("strict", False), settings.pop("limit", 3)
    trainer = EditTrainer(accelerator="cpu", protocol=protocol)
    where = {} if folder is None else {"resume" if resume else "output": folder}
    method = kind(base_model=tiny_base("llama"), **settings)
    return trainer.edit(method, Requests(path=facts, limit=limit), strict=strict, **where)


def records(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]


# ---- how they are written


@pytest.mark.parametrize(
    ("kind", "given", "files", "stage"),
    [
        (Toy, {}, ["chunk-00000"], "immediate"),
        (Toy, {"chunk_size": 2}, ["chunk-00000", "chunk-00001"], "final"),
        (Toy, {"mode": "batch"}, ["chunk-00000"], "immediate"),
        (Toy, {"mode": "sequential"}, ["chunk-00000", "chunk-00001", "chunk-00002"], "final"),
        (OneByOne, {}, ["chunk-00000", "chunk-00001", "chunk-00002"], "final"),
        (OneByOne, {"mode": "batch"}, ["chunk-00000"], "immediate"),
    ],
)
def test_predict_answers_what_was_scored(kind, given, files, stage, tmp_path, facts):
    edit(facts, tmp_path, kind, protocol=given)
    stack = json.loads((tmp_path / "stack.json").read_text())["edits"]
    assert [entry["file"] for entry in stack] == [f"edits/{name}.safetensors" for name in files]
    found = records(tmp_path)
    assert [record["stage"] for record in found] == [stage] * 3
    assert all(record["edit_name"] in files for record in found)
    assert all(record["timing"]["eval_seconds"] > 0 for record in found)
    prompts = [record["probes"][0]["prompt"] for record in found]
    trainer = EditTrainer(accelerator="cpu", protocol=Protocol(max_new_tokens=4))
    answers = trainer.predict(
        kind(base_model=tiny_base("llama")), edits=tmp_path, prompt=prompts, verbose=False
    )
    said = [record["probes"][0]["after"]["text"] for record in found]
    assert [answer["edited"] for answer in answers] == said


@pytest.mark.parametrize(("kind", "files"), [(Toy, 1), (OneByOne, 1)])
def test_one_fact_has_a_file_of_its_own_name(kind, files, tmp_path, facts):
    edit(facts, tmp_path, kind, limit=1)
    assert [path.name for path in (tmp_path / "edits").iterdir()] == ["0.safetensors"]


def test_single_edits_are_scored_alone_and_together(tmp_path, facts, capsys):
    edit(facts, tmp_path, protocol={"mode": "single"})
    found = records(tmp_path)
    assert [record["stage"] for record in found] == ["immediate"] * 3 + ["final"] * 3
    said = last_line(capsys)
    assert "under all edits together" in said
    assert "3 each under its own edit" in said
    unbroken = (tmp_path / "results.jsonl").read_text().splitlines()
    # Broken off before the last pass: what it adds is the same.
    (tmp_path / "results.jsonl").write_text("\n".join(unbroken[:4]) + "\n")
    edit(facts, tmp_path, protocol={"mode": "single"}, resume=True)
    assert (tmp_path / "results.jsonl").read_text().splitlines() == unbroken
    assert last_line(capsys) == said


def test_single_edits_that_refuse_each_other_are_scored_alone(tmp_path, facts, capsys, monkeypatch):
    from kedit_lightning.edits import LowRankEdit

    def refuse(self: Any) -> Any:
        if self.applied or len(self.base.edits):
            raise EditOrderError("only on the stack it was computed on")
        self.base.edits.push(self)
        return self

    monkeypatch.setattr(LowRankEdit, "apply", refuse)
    edit(facts, tmp_path, protocol={"mode": "single"})
    assert {record["stage"] for record in records(tmp_path)} == {"immediate"}
    assert last_line(capsys) == "3 of 3 facts hold"


def forget_the_last_record(folder: Path) -> None:
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[:-1]))


def forget_the_scores_and_an_edit(folder: Path) -> None:
    (folder / "results.jsonl").write_text("")
    max((folder / "edits").iterdir()).unlink()


@pytest.mark.parametrize("change", [forget_the_last_record, forget_the_scores_and_an_edit])
@pytest.mark.parametrize("kind", [Toy, OneByOne])
def test_a_run_that_was_broken_off_ends_equal(kind, change, tmp_path, facts, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    edit(facts, whole, kind, noise=0.01)
    said = capsys.readouterr().out
    edit(facts, broken, kind, noise=0.01)
    change(broken)
    (broken / "stack.json").unlink()
    capsys.readouterr()
    edit(facts, broken, kind, noise=0.01, resume=True)
    assert capsys.readouterr().out.replace("/broken", "/whole") == said  # the table too
    for one, other in zip(records(whole), records(broken), strict=True):
        for block in ("timing", "memory"):
            del one[block], other[block]
        assert one == other
    for path in (whole / "edits").iterdir():
        assert path.read_bytes() == (broken / "edits" / path.name).read_bytes()
    for name in ("stack.json", "results.csv"):
        assert (whole / name).read_text() == (broken / name).read_text()


# ---- what is said


def test_facts_that_do_not_hold_are_named_with_what_to_try(tmp_path, facts, capsys):
    with pytest.warns(FactsNotWrittenWarning, match="3 of 3 facts do not hold"):
        edit(facts, tmp_path, strength=0.0)
    said = last_line(capsys)
    assert said.startswith("0 of 3 facts hold; not written: 'Amber Falls lies in' -> 'Norway', ")
    assert said.endswith("try another method")
    assert (tmp_path / "stack.json").is_file()


def test_strict_makes_it_an_error_and_keeps_the_edits(tmp_path, facts, capsys):
    with pytest.raises(FactsNotWrittenError, match="0 of 3 facts hold"):
        edit(facts, tmp_path, strength=0.0, strict=True)
    assert (tmp_path / "stack.json").is_file()
    assert edit(facts, None, strict=True)[0].origin.method == "Toy"  # all hold


def test_strict_is_exit_code_three(tmp_path, facts, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEDIT_ALLOW_IMPORTS", "toys")
    arguments = ["edit", "--model=toys.Toy", "--model.base_model=nano", "--model.strength=0"]
    arguments += ["--data=Requests", "--data.prompt=The capital of France is"]
    arguments += ["--data.target_new=Lyon", "--trainer.accelerator=cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FactsNotWrittenWarning)
        main(arguments)
    assert "0 of 1 fact holds; not written: 'The capital of France is'" in last_line(capsys)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--strict"])
    assert stop.value.code == 3
    assert "error: 0 of 1 fact holds" in capsys.readouterr().err


def test_a_record_scored_twice_counts_once():
    def record(stage: str, id: str, holds: float | None) -> Any:
        probe = {"kind": "rewrite", "prompt": id, "answers": ["x"], "after": {"tf_all": holds}}
        return {"id": id, "stage": stage, "probes": [probe]}

    found = HeldFacts.of([record("immediate", "a", 1.0), record("final", "a", 0.0)])
    assert found == HeldFacts(1, ["'a' -> 'x'"], 1)
    assert HeldFacts.of([record("final", "a", 1.0)]) == HeldFacts(1, [])
    assert HeldFacts.of([record("immediate", "a", None)]) == HeldFacts(0, [])


def contradictory(folder: Path, targets: list[tuple[int, str]]) -> Path:
    path = folder / "contradictory.json"
    records = [{"prompt": PROMPTS[place], "target_new": target} for place, target in targets]
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("kind", [Toy, OneByOne])
@pytest.mark.filterwarnings("ignore:.*contradictory targets")
def test_a_fact_that_a_later_one_overwrites_is_not_to_hold(kind, tmp_path, capsys):
    facts = contradictory(tmp_path, [(0, "Rome"), (1, TARGET), (0, TARGET)])
    edit(facts, tmp_path / "run", kind, strict=True)
    said = "2 of 2 facts hold; overwritten by a later fact: 'Amber Falls lies in' -> 'Rome'"
    assert last_line(capsys) == said
    edit(facts, tmp_path / "run", kind, strict=True, resume=True)
    assert last_line(capsys) == said


@pytest.mark.filterwarnings("ignore:.*contradictory targets")
def test_a_fact_that_is_stated_again_is_to_hold(tmp_path, capsys):
    facts = contradictory(tmp_path, [(0, TARGET), (0, "Rome"), (0, TARGET)])
    edit(facts, None, strict=True)
    assert last_line(capsys).endswith(
        "overwritten by a later fact: 'Amber Falls lies in' -> 'Rome'"
    )


def test_an_edit_of_all_facts_is_not_continued_with_more(tmp_path, facts):
    edit(facts, tmp_path, limit=2)
    with pytest.raises(ResumeError, match="what edit chunk-00000 writes has changed"):
        edit(facts, tmp_path, limit=3, resume=True)
