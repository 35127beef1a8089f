"""Perplexity and questions with choices under the edits of a run, in every mode."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import REQUESTS, tiny_base
from toys import Toy

from kedit_lightning import BaseModel, Edit, EditTrainer
from kedit_lightning.analysis.ability import ability_scores, needs_harness
from kedit_lightning.analysis.known_choices import (
    CHOICES,
    QUESTIONS,
    choice_questions,
    choice_scores,
)
from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.canary import Canary
from kedit_lightning.callbacks import AbilityCheck, AbilitySample, ResultsWriter
from kedit_lightning.data import NanoFacts, Requests
from kedit_lightning.data.plain_text import passages_of
from kedit_lightning.errors import UnsupportedUseError

SHORT = {"max_new_tokens": 2}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base("gpt2")


def test_the_questions_ask_for_true_objects_of_subjects_that_no_test_edits() -> None:
    questions = choice_questions()
    assert len({q.id for q in questions}) == len(questions) == QUESTIONS
    train = {e.id: e.requests[0] for e in NanoFacts().examples("train")}
    tested = {r.subject for e in NanoFacts().examples("test") for r in e.requests}
    for question in questions:
        request = train[question.id]
        assert question.prompt == request.prompt
        assert question.choices[question.right] == request.target_old
        assert len(set(question.choices)) == CHOICES
        assert request.subject not in tested
    places = [question.right for question in questions]
    assert all(places.count(at) > QUESTIONS // 8 for at in range(CHOICES))
    assert choice_questions(7) == questions[:7]


@torch.no_grad()
def test_the_likeliest_choice_is_that_of_whole_passes(base: BaseModel) -> None:
    found = choice_scores(base, 3, 5)
    for question in choice_questions(5):
        values = []
        for choice in question.choices:
            row = base.encode(question.prompt, choice)
            ids = torch.tensor([[*row.prompt, *row.answer]])
            logs = base.model(ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
            values.append(logs[range(len(row.answer)), list(row.answer)].sum().item())
        assert found[question.id] == float(max(values) == values[question.right])


def test_nano_knows_them_and_they_need_no_harness() -> None:
    scores = ability_scores(BaseModel.load("nano"), ["nano_choices"], limit=20)
    assert not needs_harness(["nano_choices"])
    assert list(scores) == [("nano_choices", "acc")]
    assert sum(scores["nano_choices", "acc"].values()) >= 19
    AbilityCheck(["nano_choices"])


@pytest.mark.parametrize(
    ("protocol", "models"),
    [
        (Protocol(**SHORT), [[0], [1]]),
        pytest.param(
            Protocol(mode="batch", chunk_size=2, **SHORT), [[0, 1], [2]], marks=pytest.mark.slow
        ),
        (Protocol(mode="sequential", **SHORT), [[0, 1, 2]]),
    ],
    ids=["single", "batch", "sequential"],
)
def test_it_reads_each_model_that_is_scored(
    base: BaseModel, protocol: Protocol, models: list[list[int]], tmp_path: Path
) -> None:
    facts = [{"id": str(n), "prompt": r.prompt, "target_new": r.target_new}
             for n, r in enumerate(REQUESTS[:3])]  # fmt: skip
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    data = Requests(path=tmp_path / "facts.json")
    callback = AbilitySample(edits=2, questions=6)
    trainer = EditTrainer(protocol=protocol, callbacks=[callback], accelerator="cpu")
    trainer.test(Toy(base_model=base), data, output=tmp_path / "run", verbose=False)
    found = json.loads((tmp_path / "run" / "ability_sample.json").read_text())
    assert found == callback.found
    assert not list(base.edits)
    canary, logs, right = Canary(base, passages_of()), [], list[float]()
    assert found["perplexity"]["before"] == pytest.approx(canary.base_perplexity())
    for model in models:
        with base.edits.restored():
            groups = [[n] for n in model] if protocol.mode == "sequential" else [model]
            for group in groups:
                Toy(base_model=base).edit([REQUESTS[n] for n in group]).apply()
            logs.append(math.log(canary.measure()["perplexity"]))
            right += choice_scores(base, limit=6).values()
    assert found["edited_models"] == len(models)
    assert found["perplexity"]["after"] == pytest.approx(math.exp(sum(logs) / len(logs)))
    assert found["perplexity"]["worst"] == pytest.approx(math.exp(max(logs)))
    assert found["choices"]["after"] == pytest.approx(sum(right) / len(right))
    assert found["choices"]["documents"] == 6


@pytest.fixture
def facts(tmp_path: Path) -> Requests:
    rows = [{"id": str(n), "prompt": r.prompt, "target_new": r.target_new}
            for n, r in enumerate(REQUESTS)]  # fmt: skip
    (tmp_path / "facts.json").write_text(json.dumps(rows))
    return Requests(path=tmp_path / "facts.json")


@pytest.mark.parametrize(
    ("mode", "loaded"),
    [("single", 1), pytest.param("sequential", len(REQUESTS), marks=pytest.mark.slow)],
)
def test_a_resumed_run_loads_no_more_than_is_looked_at(
    base: BaseModel, facts: Requests, mode: Any, loaded: int, tmp_path: Path, monkeypatch: Any
) -> None:
    def run(**where: Any) -> dict[str, Any]:
        callback = AbilitySample(edits=1, questions=2)
        protocol = Protocol(mode=mode, generate=False)
        trainer = EditTrainer(protocol=protocol, callbacks=[callback], accelerator="cpu")
        trainer.test(Toy(base_model=base), facts, verbose=False, **where)
        return callback.found

    found, files = run(output=tmp_path / "run"), list[Path]()
    load = Edit.load
    monkeypatch.setattr(
        Edit, "load", lambda path, *rest: files.append(Path(path)) or load(path, *rest)
    )
    assert run(resume=tmp_path / "run") == found
    assert len(files) == loaded  # a stream's are on the stack, and are not read a second time


def test_a_run_without_edits_says_so(base: BaseModel, facts: Requests, tmp_path: Path) -> None:
    folder, trainer = tmp_path / "run", EditTrainer(accelerator="cpu")
    trainer.test(Toy(base_model=base), facts, verbose=False, output=folder)
    (folder / "stack.json").unlink()
    callback = AbilitySample(questions=2)
    trainer = EditTrainer(callbacks=[callback, ResultsWriter()], usual_callbacks=False,
                          accelerator="cpu")  # fmt: skip
    with pytest.warns(UserWarning, match="AbilitySample found no edit to look at"):
        trainer.test(Toy(base_model=base), facts, verbose=False, resume=folder)
    assert not callback.found
    assert not (folder / "ability_sample.json").exists()


@pytest.mark.parametrize("settings", [{"edits": 0}, {"margin": 1.0}, {"questions": 0}])
def test_settings_that_do_not_fit_are_refused(base: BaseModel, settings: dict[str, Any]) -> None:
    trainer = EditTrainer(callbacks=[AbilitySample(**settings)], accelerator="cpu")
    with pytest.raises(UnsupportedUseError, match="at least one edit"):
        trainer.test(Toy(base_model=base), NanoFacts(limit=1), verbose=False)
