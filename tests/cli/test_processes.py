"""Several processes, started by the command and from outside: results are those of one process."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from places import ROOT
from toys import Toy

from kedit_lightning import BaseModel, Edit, EditTrainer
from kedit_lightning.cli.main import main
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import ROME
from kedit_lightning.runs.processes import check_processes, processes_here

KEDIT = [str(Path(sys.executable).with_name("kedit"))]
MODULE = [sys.executable, "-m", "kedit_lightning"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *MODULE[1:]]
SHARDED = ROOT / "examples" / "sharded_editing.py"
TWO = ["--trainer.devices", "2"]
NANO = ["-c", "data/nano_facts", "--data.limit", "5", "--trainer.accelerator", "cpu"]


#: No run here takes a third of it on one busy core; processes that wait for each other never end.
SECONDS = 150


def run(start: list[str], *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command, and end it with all processes it has started if it does not end itself."""
    command, environment = [*start, *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            out, errors = process.communicate(timeout=SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == code, errors
    return subprocess.CompletedProcess(command, code, out, errors)


def records(folder: Path) -> dict[tuple[str, str], dict]:
    lines = (folder / "results.jsonl").read_text().splitlines()
    costs = ("timing", "memory")
    parsed = [{k: v for k, v in json.loads(line).items() if k not in costs} for line in lines]
    by_stage = {(record["id"], record["stage"]): record for record in parsed}
    assert len(by_stage) == len(parsed) == 5 * len({stage for _, stage in by_stage})
    return by_stage


@pytest.mark.slow
@pytest.mark.timeout(6 * SECONDS)
@pytest.mark.parametrize(
    ("mode", "ways"),
    [("single", ("devices", "torchrun_devices")), ("sequential", ("ddp", "torchrun"))],
    ids=["single", "sequential"],
)
def test_the_command_gives_the_results_of_one_process(mode, ways, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = ["test", "-c", "methods/rome", *NANO, "-c", f"trainer/{mode.replace('single', 'batch')}"]
    test += ["--trainer.protocol.chunk_size=2", f"--trainer.protocol.mode={mode}", "--output"]
    run(KEDIT, *test, "one")
    expected = records(tmp_path / "one")
    starts = {
        "devices": [*KEDIT, *test, "devices", *TWO],
        "ddp": [*MODULE, *test, "ddp", *TWO, "--trainer.strategy", "ddp"],
        "torchrun": [*TORCHRUN, *test, "torchrun"],
        "torchrun_devices": [*TORCHRUN, *test, "torchrun_devices", *TWO],
    }
    for name in ways:
        done = run(starts[name])
        assert records(tmp_path / name) == expected, name
        assert done.stdout.count("rewrite/tf_all") == (1 if mode == "single" else 3), name
        scores = json.loads((tmp_path / name / "results.json").read_text())["scores"]
        assert scores == json.loads((tmp_path / "one/results.json").read_text())["scores"]


@pytest.mark.slow
@pytest.mark.timeout(6 * SECONDS)
def test_edit_fit_predict_and_resume_in_two_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(KEDIT, "edit", "-c", "methods/rome", *NANO, *TWO, "--output", "run")
    assert "5 edits saved in run" in done.stdout
    done = run(KEDIT, "predict", "--edits", "run", "--prompt", "Rome is", *TWO)
    assert done.stdout.count("5 edits applied") == 1
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    done = run(KEDIT, "fit", "-c", "methods/mend", *NANO, *few, *TWO, "--output", "fit")
    assert "training curves: fit/training.png" in done.stdout
    assert (tmp_path / "fit/config.yaml").exists()
    # The first process alone compares settings; the other one waits for it.
    other = ["--trainer.protocol.chunk_size=7", *TWO]
    done = run(KEDIT, "edit", "--resume", "run", *other, code=2)
    assert "chunk_size: 1 -> 7" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_line_stays_for_the_processes_it_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEDIT_ALLOW_IMPORTS", "toys")
    fact = ["--data=Requests", "--data.prompt=Lyon is in", "--data.target_new=Rome"]
    given = ["kedit", "edit", "--model=Toy", *fact, "--output=run", "--trainer.accelerator=cpu"]
    monkeypatch.setattr(sys, "argv", list(given))
    main()
    assert sys.argv == given
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["model"]["class_path"] == f"{Toy.__module__}.Toy"


def test_processes_of_torchrun_are_used_or_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # of something else than torchrun
    assert processes_here() == 1
    check_processes(1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert processes_here() == 3
    check_processes(6)
    with pytest.raises(UnsupportedUseError, match=r"started 6 processes.* is set to 1; .* to 3"):
        EditTrainer(devices=1, accelerator="cpu", logger=False)


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy()])
def test_strategies_that_shard_are_refused(strategy):
    with pytest.raises(UnsupportedUseError, match=r"not the base model.*sharded_editing\.py"):
        check_processes(1, strategy)


def test_a_trainer_asks_for_its_strategy():
    with pytest.raises(UnsupportedUseError, match="ModelParallelStrategy shards"):
        EditTrainer(strategy=ModelParallelStrategy(), accelerator="cpu", logger=False)


@pytest.mark.slow
@pytest.mark.timeout(6 * SECONDS)
def test_a_sharded_model_is_edited_as_a_whole_one(tmp_path, monkeypatch):
    """ROME on nano, sharded over two processes: the edit of one process, bit for bit."""
    base, fact = BaseModel.load("nano"), runpy.run_path(str(SHARDED))["FACT"]
    whole = ROME(base_model=base).edit([fact])
    monkeypatch.setenv("EDITS", str(tmp_path))
    done = run([*TORCHRUN[:5], str(SHARDED)])
    assert done.stdout.count("' Rome") == 1
    assert f"edit {whole.id}, part" in done.stdout
    size = base.model.model.layers[0].mlp.down_proj.weight.numel()
    assert done.stdout.strip().endswith(f"part {size // 2}")
    saved = Edit.load(tmp_path / "edit.safetensors", base)
    assert all(torch.equal(a, b) for a, b in zip(
        saved.deltas().values(), whole.deltas().values(), strict=True))  # fmt: skip
