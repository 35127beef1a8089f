"""Processes that measure one after the other, so that what else a machine does meets all alike."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def environment_of(root: Path) -> dict[str, str]:
    """Environment of a process that imports the version of this package in a folder."""
    paths = [str(root.resolve() / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


class Server:
    """A process that says that it is ready, and then answers each line with one of JSON.

    Args:
        command: Program and arguments.
        environment: Its environment, by default that of this process.
        folder: Where it runs, by default here.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        while self._line().strip() != "ready":
            pass

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise RuntimeError(f"the process ended with code {code}: {' '.join(said[-1:])}")
        return line

    def run(self) -> Any:
        """Let it measure once.

        Raises:
            RuntimeError: It has ended; the message has its last line.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


def timed_test(editor: Any, data: Any, **settings: Any) -> tuple[float, dict[str, float]]:
    """Processor seconds of editing and scoring under `single`, and the scores.

    Args:
        editor: The method.
        data: The data.
        **settings: Further settings of the protocol.
    """
    from kedit_lightning import EditTrainer
    from kedit_lightning.benchmark import Protocol

    protocol = Protocol(mode="single", **settings)
    trainer = EditTrainer(protocol=protocol, enable_progress_bar=False, usual_callbacks=False)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KEDIT_CACHE"] = folder
        start = time.process_time()
        (scores,) = trainer.test(editor, data, verbose=False)
        seconds = time.process_time() - start
    kept = {k: v for k, v in scores.items() if not k.startswith(("timing/", "memory/"))}
    return seconds, kept


def ratio_of(pairs: Sequence[tuple[float, float]]) -> str:
    """Median of the first over the second, with the lowest and the highest of the pairs.

    >>> ratio_of([(2.0, 1.0), (3.0, 1.0), (8.0, 2.0)])
    '3.00 (2.00 to 4.00)'
    """
    ratios = [first / second for first, second in pairs]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
