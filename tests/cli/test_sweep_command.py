"""`kedit sweep`: settings tried in process, by one worker and by two of which one is killed."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from places import ROOT, SAMPLES, TESTS
from support import tiny_model, tiny_tokenizer

pytest.importorskip("optuna", reason="sweeps need the extra `sweep`")

from kedit_lightning.cli import sweep_command
from kedit_lightning.cli.main import main
from kedit_lightning.cli.sweep_trial import built_test
from kedit_lightning.errors import MissingExtraError

FACTS = str(SAMPLES / "facts.json")
SWEEP: dict[str, Any] = {
    "objective": "rewrite/tf_all",
    "split": "test",
    "space": {"model.strength": {"low": 0.1, "high": 60.0}, "model.fail_on": [None, "Falls"]},
    "every": 1,
    "startup": 2,
}


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEDIT_ALLOW_IMPORTS", "toys")
    monkeypatch.chdir(tmp_path)
    import toys  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_model("llama", torch.float32).save_pretrained(root / "llama")
    tiny_tokenizer(True).save_pretrained(root / "llama")
    return root


@pytest.fixture
def arguments(folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(SWEEP))
    return [
        "sweep",
        "toy.yaml",
        "--model=toys.Toy",
        f"--model.base_model={folder / 'llama'}",
        "--data=Requests",
        f"--data.path={FACTS}",
        "--data.limit=3",
        "--trainer.accelerator=cpu",
        "--trainer.protocol.max_new_tokens=2",
        "--output=out",
    ]


def trials_in(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "out/trials.csv").read_text().splitlines()))


def said(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 0) -> str:
    with pytest.raises(SystemExit) as left:
        main(words)
    captured = capsys.readouterr()
    assert left.value.code == code, captured.err
    return captured.err if code else captured.out


def test_a_sweep_from_start_to_best_config(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = said(capsys, [*arguments, "--trials", "3"])
    rows = trials_in(tmp_path)
    assert len(rows) == 3
    states = {row["model.fail_on"]: row["state"] for row in rows}
    assert states["Falls"] == "failed"
    assert "the toy fails on purpose" in text
    assert states[""] in ("complete", "pruned")
    assert "best.yaml, trials.csv and sweep.png are in out" in text
    assert (tmp_path / "out/sweep.png").stat().st_size > 5000
    assert not list((tmp_path / "out/trials").rglob("*.safetensors"))
    with closing(sqlite3.connect(tmp_path / "out/sweep.db")) as storage:
        reported = storage.execute("SELECT step FROM trial_intermediate_values").fetchall()
    assert (1,) in reported

    # Given again, it has nothing to do; the best config is one that `kedit test` takes.
    again = said(capsys, [*arguments, "--trials", "3"])
    assert "has 3 trials already" in again
    assert not list((tmp_path / "out/trials").glob("0003"))
    other = said(capsys, [*arguments, "--study=other"], 2)
    assert "out holds trials, and study 'other' has run none" in " ".join(other.split())
    assert trials_in(tmp_path) == rows
    main(["test", "-c", "out/best.yaml", "--output=run"])
    best = max((r for r in rows if r["state"] == "complete"), key=lambda row: float(row["value"]))
    trial = json.loads((tmp_path / "out" / best["folder"] / "results.json").read_text())
    fresh = json.loads((tmp_path / "run/results.json").read_text())
    assert trial["scores"] == fresh["scores"]
    assert trial["method"]["settings"] == fresh["method"]["settings"]
    assert trial["scores"]["rewrite/tf_all"]["mean"] == float(best["value"])


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--objective=rewrite/tf_al"], "was rewrite/tf_all"),
        (["--model.strenth=1"], "was strength meant?"),
        (["--resume=x"], "a sweep has no --resume"),
        (["--trainer.devices=2"], "several workers share one storage"),
        (["--trials=none"], "trials must be a whole number"),
        (["--pruner=mean"], "pruner must be one of median, halving, none"),
        (["--split=validation"], "has no validation split"),
        (["--data.path=absent.json"], "absent.json"),
        (["word"], "'word' is no option"),
    ],
)
def test_wrong_input_is_refused_before_any_trial(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    more: list[str],
    complaint: str,
) -> None:
    assert complaint in said(capsys, [*arguments, *more], code=2)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_sweep(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "no sweep file 'x.yaml'" in said(capsys, ["sweep", "x.yaml"], code=2)
    assert "needs a YAML file" in said(capsys, ["sweep"], code=2)
    assert "usage: kedit sweep" in said(capsys, ["sweep", "--help"])
    for text, complaint in {
        "space: [": "is no YAML",
        "hello": "must be a mapping",
        "spaces: {}": "has no 'spaces' (was space meant?)",
        "space: {model.lr: [1, 2]}": "has no objective",
    }.items():
        (tmp_path / "toy.yaml").write_text(text)
        assert complaint in said(capsys, arguments, code=2)


def test_optuna_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_command, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"kedit-lightning\[sweep\]"):
        sweep_command.run_sweep(["toy.yaml"])


def test_the_sweep_of_wandb_in_the_page_calls_a_test() -> None:
    page = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
    (text,) = (
        block for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if "${args}" in block
    )
    sweep = yaml.safe_load(text)
    given = [
        f"--{name}={values.get('value', values.get('min', values.get('values', [None])[0]))}"
        for name, values in sweep["parameters"].items()
    ]
    words = [w for word in sweep["command"] for w in (given if word == "${args}" else [word])]
    words = [word for word in words if word not in ("${env}", "${interpreter}")]
    assert words[:2] == ["kedit", "test"]
    built = built_test(words[2:])
    assert built.trainer.loggers
    assert sweep["metric"]["name"] == "rewrite/tf_all"


def test_sweeps_in_the_page_are_sweeps(tmp_path: Path) -> None:
    page = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
    plans = sweep_command.import_module("kedit_lightning.cli.sweep_plan")
    blocks = [b for b in re.findall(r"```yaml\n(.*?)```", page, re.S) if "objective:" in b]
    assert blocks
    for block in blocks:
        (tmp_path / "page.yaml").write_text(block)
        plan = plans.read_plan(["page.yaml"], "")
        first = [f"--{name}={part.first}" for name, part in plan.space.items()]
        built_test([*plan.test_arguments, *first])


def start(arguments: list[str], log: Path) -> subprocess.Popen[str]:
    code = "import sys; from kedit_lightning.cli.main import main; sys.exit(main())"
    paths = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=environment, stdout=file, stderr=file, text=True,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kill", [True, False], ids=["one killed", "both to the end"])
def test_two_workers_lose_and_double_nothing(
    arguments: list[str], tmp_path: Path, kill: bool
) -> None:
    count = 12 if kill else 6
    arguments += [f"--trials={count}", "--heartbeat=1", "--pruner=none"]
    workers = [start(arguments, tmp_path / f"{n}.log") for n in range(2)]
    trials = tmp_path / "out/trials"
    while kill and len(list(trials.glob("00*/results.jsonl"))) < 4 and workers[0].poll() is None:
        time.sleep(0.01)
    if kill:
        workers[0].send_signal(signal.SIGKILL)
        assert workers[0].wait() == -signal.SIGKILL, "it was over before"
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert workers[1].wait(200) == 0, logs
    assert kill or workers[0].wait(200) == 0, logs
    rows = trials_in(tmp_path)
    assert [int(row["trial"]) for row in rows] == list(range(count))
    assert {row["state"] for row in rows} <= {"complete", "failed"}
    assert all(row["error"].startswith("the toy") for row in rows if row["state"] == "failed")
    draws = {(row["model.strength"], row["model.fail_on"]) for row in rows}
    assert len(draws) == count
    # What the storage itself says: no trial runs, and none has two results.
    with closing(sqlite3.connect(tmp_path / "out/sweep.db")) as storage:
        states = [state for (state,) in storage.execute("SELECT state FROM trials")]
        errors = storage.execute("SELECT count(*) FROM trial_user_attributes WHERE key = 'error'")
        failed = sum(row["state"] == "failed" for row in rows)
        assert not {"RUNNING", "WAITING"} & set(states)
        assert states.count("COMPLETE") == count - failed
        assert errors.fetchone() == (failed,)
        assert len(states) - count <= int(kill), shlex.join(states)
