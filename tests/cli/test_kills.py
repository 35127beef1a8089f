"""Commands that are killed at any moment and continued end like those that are not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from run_folders import assert_equal, content, progress

KEDIT = str(Path(sys.executable).with_name("kedit"))
DATA = ["-c", "data/nano_facts", "--data.limit=6", "--trainer.accelerator=cpu"]
DATA += ["--trainer.protocol.max_new_tokens=4"]
#: Command, method, and how edits are grouped.  `edit` writes one batch with MEMIT and FTM, and
#: with ROME and GRACE a sequence.
CASES = (
    ("test", "memit", "single", 3),
    ("test", "ftm", "sequential", 2),
    ("edit", "rome", None, 1),
    ("test", "grace", "sequential", 1),
    ("edit", "memit", "sequential", 2),
    ("test", "memit", "batch", 3),
    ("edit", "ftm", None, 1),
    ("test", "grace", "single", 4),
    ("edit", "grace", None, 1),
    ("test", "ftm", "batch", 2),
)
#: How many commands are killed.
COUNT = int(os.environ.get("KEDIT_KILLS", "4"))
#: Longest wait for one command, here with a busy machine in mind.
SECONDS = 300


def start(case: int, folder: Path, resume: bool = False) -> subprocess.Popen[str]:
    """Start the command of a case, with a cache of its own beside its folder."""
    command, method, mode, size = CASES[case]
    line = [KEDIT, command, "-c", f"methods/{method}", *DATA]
    line += [f"--trainer.protocol.chunk_size={size}"]
    line += [] if mode is None else [f"--trainer.protocol.mode={mode}"]
    line += ["--resume" if resume else "--output", str(folder)]
    environment = {"KEDIT_CACHE": str(folder.parent / "cache"), "OMP_NUM_THREADS": "1"}
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        return subprocess.Popen(
            line, env={**os.environ, **environment}, stdout=log, stderr=log, text=True
        )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives what the command of a case writes, how many pieces, and the seconds it takes."""

    @cache
    def written(case: int) -> tuple[dict[str, Any], int, float]:
        folder, began = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
        assert start(case, folder).wait(SECONDS) == 0
        return content(folder), progress(folder), time.monotonic() - began

    return written


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.parametrize("number", range(COUNT))
def test_a_killed_command_goes_on(number: int, tmp_path: Path, unbroken: Any) -> None:
    case, chance, folder = number % len(CASES), random.Random(number), tmp_path / "run"
    expected, pieces, seconds = unbroken(case)
    goal = chance.randrange(pieces)
    delay = chance.random() * (0.05 if goal else seconds / 2)  # before the first, long things begin
    process = start(case, folder)
    try:
        while process.poll() is None and progress(folder) < goal:
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was over before"
    # Nothing can be continued before there is a `run.json`; the command is then given again.
    assert start(case, folder, (folder / "run.json").exists()).wait(SECONDS) == 0
    assert_equal(content(folder), expected)
