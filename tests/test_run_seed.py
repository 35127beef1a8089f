"""``seed_everything`` is the seed of method, data and intervals without one of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch import seed_everything

from kedit_lightning import methods
from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.run_context import RunContext, new_metrics
from kedit_lightning.cli.main import main
from kedit_lightning.data import NanoFacts
from kedit_lightning.run_seed import run_seed


@pytest.mark.parametrize("method", methods.METHODS)
def test_the_seed_of_the_run_is_that_of_a_method_without_one(method, monkeypatch):
    kind = getattr(methods, method)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert kind().settings.seed == run_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert (kind().settings.seed, kind().given.seed) == (7, None)
    assert kind(seed=0).settings.seed == 0


def test_the_seed_of_the_run_draws_records_and_intervals(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    drawn = {seed: [e.id for e in NanoFacts(limit=5, seed=seed).examples()] for seed in (0, 1)}
    assert drawn[0] != drawn[1]
    assert [e.id for e in NanoFacts(limit=5).examples()] == drawn[0]
    seed_everything(1, verbose=False)
    assert [e.id for e in NanoFacts(limit=5).examples()] == drawn[1]
    assert RunContext().seed == 1
    for protocol in (Protocol(), Protocol(answers="squad"), Protocol(scoring="legacy_easyedit")):
        assert new_metrics(protocol, 1).seed == 1


def test_results_name_the_seed_that_was_used(monkeypatch, tmp_path):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored afterwards
    monkeypatch.chdir(tmp_path)
    shared = ["test", "--model=FTM", "--model.steps=1", "--data=NanoFacts", "--data.limit=1"]
    shared += ["--trainer.accelerator=cpu", "--trainer.protocol.generate=false"]
    main([*shared, "--seed_everything=5", "--output=run"])
    main([*shared, "--seed_everything=5", "--output=own", "--model.seed=0", "--data.seed=0"])
    run, own = (json.loads(Path(name, "results.json").read_text()) for name in ("run", "own"))
    assert run["seed"] == own["seed"] == 5
    assert [facts["method"]["resolved"]["seed"] for facts in (run, own)] == [5, 0]
    assert "seed 5" in run["metric_protocol"]["intervals"]
    ids = [json.loads(Path(name, "results.jsonl").read_text())["id"] for name in ("run", "own")]
    assert ids[0] != ids[1]
