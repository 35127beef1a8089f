"""Runs cells one after another, each in a process of its own, and keeps those that are finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from benchmark_cells import CONFIGS, TRIALS, Cell, Sweep

from kedit_lightning.edits.edit_file import write_atomically

#: Says that a cell or sweep is finished; without it, its folder is run again or continued.
MARK = "cell.json"


class Step(Protocol):
    """A cell or a sweep."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def command(self) -> str:
        """The command that anyone can run."""

    def arguments(self, output: str) -> list[str]:
        """Arguments of its `kedit` command."""


@dataclass(frozen=True)
class Ended:
    """How a process has ended.

    Args:
        code: Its exit status.
        seconds: Its processor time.
        peak: Its largest resident size, in bytes.
    """

    code: int
    seconds: float
    peak: int


Execute = Callable[[Sequence[str], Path], Ended]


def forked(arguments: Sequence[str], log: Path) -> Ended:
    """Run `kedit` in a copy of this process, which has everything imported, with a log file.

    A process a cell keeps a crash, and the peak of memory, to itself.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _run_and_leave(arguments, log)
    try:
        _, status, usage = os.wait4(child, 0)
    except KeyboardInterrupt:
        os.kill(child, signal.SIGKILL)
        os.wait4(child, 0)
        raise
    unit = 1 if sys.platform == "darwin" else 1024
    seconds = usage.ru_utime + usage.ru_stime
    return Ended(os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * unit)


def _run_and_leave(arguments: Sequence[str], log: Path) -> None:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.argv = ["kedit", *arguments]
        from kedit_lightning.cli.main import main

        main()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finished(step: Step, folder: Path) -> dict[str, Any] | None:
    """What is known of a finished step; nothing where it has not run, or by another command."""
    path = folder / step.name / MARK
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["command"] == step.command else None


def run(step: Step, folder: Path, execute: Execute = forked) -> dict[str, Any]:
    """Run a step, or continue it, and mark it as finished; an error is one sentence of it."""
    own = folder / step.name
    asked = own.with_suffix(own.suffix + ".asked")
    arguments = step.arguments(str(own))
    if own.exists() and not (asked.is_file() and asked.read_text("utf-8") == step.command):
        shutil.rmtree(own)  # left by another command
    if isinstance(step, Cell) and own.exists():
        if (own / "run.json").is_file():
            arguments = ["test", "--resume", str(own), "--verbose", "false"]
        else:
            shutil.rmtree(own)
    own.parent.mkdir(parents=True, exist_ok=True)
    asked.write_text(step.command, encoding="utf-8")
    log, began = own.with_suffix(own.suffix + ".log"), time.time()
    ended = execute(arguments, log)
    found = {
        "name": step.name,
        "command": step.command,
        "wall_seconds": round(time.time() - began, 1),
        "processor_seconds": round(ended.seconds, 1),
        "peak_bytes": ended.peak,
        "finished": time.strftime("%Y-%m-%d %H:%M"),
    }
    if ended.code < 0:  # killed from outside: nothing is known of it
        raise SystemExit(f"{step.name} was killed (signal {-ended.code}); the same command goes on")
    if ended.code:
        found["error"] = _last_line(log)
    own.mkdir(exist_ok=True)
    for edits in [own / "edits", *own.glob("orders/*/edits")]:
        shutil.rmtree(edits, ignore_errors=True)  # large, and computed again by the command
    write_json(own / MARK, found)
    return found


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")] or lines[-1:] or ["no word"]
    return said[-1].removeprefix("error: ")


def write_json(path: Path, content: Any) -> None:
    """Write a file whole."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode("utf-8"))


def take_settings(sweep: Sweep, folder: Path, settings: Path | None = None) -> Path | None:
    """Write the best settings of a finished sweep as a config; none where no trial has a score."""
    best = folder / sweep.name / "best.yaml"
    if not best.is_file():
        return None
    text = best.read_text(encoding="utf-8")
    head, *_ = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    config: Mapping[str, Any] = yaml.safe_load(text)
    asked = yaml.safe_load((CONFIGS / "benchmark/sweeps" / f"{sweep.method}.yaml").read_text())
    names = [path.removeprefix("model.") for path in asked["space"]]
    kind, given = config["model"]["class_path"], config["model"]["init_args"]
    chosen = {"class_path": kind, "init_args": {name: given[name] for name in names}}
    data = sweep.own_data or "nano_facts"
    model = f"--model.base_model {sweep.model} " if sweep.own_data else ""
    lines = [
        f"# kedit test -c methods/{sweep.method} -c data/{data} -c benchmark/single -c "
        f"benchmark/settings/{sweep.model}/{sweep.method} {model}--data.limit 30 --output run/",
        "#",
        f"# {head.replace(f' of study {sweep.method}', '')}, on {sweep.facts} facts.",
        f"# Chosen among {TRIALS} trials by {sweep.command}",
    ]
    target = settings or CONFIGS / "benchmark" / "settings"
    path = target / sweep.model / f"{sweep.method}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    dumped = yaml.safe_dump({"model": chosen}, sort_keys=False)
    path.write_text("\n".join([*lines, dumped]), encoding="utf-8")
    return path


class Progress:
    """Tells what is done and how long the rest may take."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._left = [step.name for step in steps]
        self.total, self._began, self._done = len(steps), time.time(), 0

    def tell(self, found: Mapping[str, Any]) -> str:
        """A line for a step that has ended."""
        self._left.remove(found["name"])
        self._done += 1
        each = (time.time() - self._began) / self._done
        left = each * len(self._left)
        clock = f"{left / 3600:.1f} h" if left > 5400 else f"{left / 60:.0f} min"
        said = f"failed: {found['error']}" if "error" in found else "done"
        return (
            f"[{self.total - len(self._left)}/{self.total}] {found['name']} {said} "
            f"({found['wall_seconds']:.0f} s); about {clock} left"
        )
