"""Streams of many facts: what is tried, what the table tells, and the picture."""

from __future__ import annotations

import json
import sys

import pytest
from long_streams import PARTS, PLANS, Job, as_run, candidates, main, table

from kedit_lightning import methods
from kedit_lightning.registry import entries

STAGES = {1: "after_1", 10: "after_10", 40: "final"}


def result(name, loss):
    """A result with scores that fall by the checkpoint."""
    scores = [
        {"key": f"{stage}/{key}", "mean": 1 - loss * at / 40, "low": 0.0, "high": 1.0, "n": at}
        for at, stage in STAGES.items()
        for key in PARTS
    ]
    age = [{"from": 0, "to": at, "mean": 1.0, "low": 0.9, "high": 1.0, "n": 1} for at in (0, 40)]
    followed = {key: {"age": age} for key in PARTS}
    kept = {"checkpoints": list(STAGES), "scores": followed, "collapse": {"at": None}}
    drift = {"checkpoints": [{"facts": at, "perplexity": 20.0 + at} for at in (0, 10, 40)]}
    return {"method": name, "facts": 40, "scores": scores, "retention": kept, "drift": drift}


def test_every_method_is_tried_as_often():
    for name, plan in PLANS.items():
        assert len(candidates(plan, 99)) == 6
        assert candidates(plan, 2) == candidates(plan, 99)[:2]
        known = entries("method")[name].load().settings_type.__dataclass_fields__
        assert {*plan.fixed, *plan.grid} - {"layers"} <= set(known), name
        assert hasattr(methods, name)


def test_a_chunk_is_that_of_the_plan_unless_facts_are_few():
    def chunk(method, facts):
        return Job(method, "nano", "cpu", facts, 8, 1, None).chunk

    assert [chunk(name, 2000) for name in ("MEMIT", "WISE", "GRACE")] == [100, 20, 100]
    assert [chunk("MEMIT", facts) for facts in (40, 3)] == [10, 1]


def test_validation_facts_are_none_of_the_test():
    job = Job("MEMIT", "nano", "cpu", 40, 20, 1, None)
    chosen = {e.requests[0].subject for e in job.data(None, "validation").examples()}
    written = {e.requests[0].subject for e in job.data(None).examples()}
    assert len(chosen) == 120
    assert len(written) == 520
    assert not chosen & written


def test_the_script_tells_and_draws_what_is_there(tmp_path, monkeypatch, capsys):
    for name, loss in (("MEMIT", 0.8), ("GRACE", 0.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(name, loss)))
    picture = tmp_path / "picture.png"
    words = ["--output", tmp_path, "--figure", picture, "--methods", "MEMIT", "GRACE"]
    monkeypatch.setattr(sys, "argv", ["long_streams.py", *map(str, words)])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert "| MEMIT | 40 | 0.20 (0.00–1.00) | 0.20 (0.00–1.00) | 0.20 (0.00–1.00) | 60 |" in lines
    assert "| MEMIT | 1 | 0.98 (0.00–1.00) | 0.98 (0.00–1.00) | 0.98 (0.00–1.00) | – |" in lines
    assert "| GRACE | 10 | 1.00 (0.00–1.00) | 1.00 (0.00–1.00) | 1.00 (0.00–1.00) | 30 |" in lines
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert as_run(result("GRACE", 0.0)).label == "GRACE"
    assert len(list(table([]))) == 2


@pytest.mark.slow
def test_a_method_runs_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    words = ["--output", tmp_path, "--base-model", "nano", "--facts", 8, "--choose", 4]
    words += ["--trials", 1, "--methods", "MEMIT"]
    monkeypatch.setattr(sys, "argv", ["long_streams.py", *map(str, words)])
    main()
    found = json.loads((tmp_path / "MEMIT.json").read_text())
    assert found["chunk"] == 2
    assert found["settings"] == {"preserve": 50, "layers": [1, 2, 3]}
    assert found["retention"]["checkpoints"] == [2, 6, 8]
    assert "| MEMIT | 8 |" in capsys.readouterr().out
