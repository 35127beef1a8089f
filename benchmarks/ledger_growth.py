"""Whether a ledger of thousands of edits costs as much to write to as an empty one.

    python benchmarks/ledger_growth.py --count 10000

Writes facts one after another with MEMIT into a ledger, the edits applied as they come, then takes
one out. Processor time, so that other work on the machine does not count. Replaying is measured on
the first edits, and taken to cost as much for each of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.methods import MEMIT
from kedit_lightning.runs import Ledger

T = TypeVar("T")
#: Appends at either end whose median is compared, and those before them that only warm up.
WINDOW, WARM_UP = 100, 20
#: Edits that are replayed to measure what one costs.
REPLAYED = 100
CITIES = ("Rome", "Paris", "Oslo", "Berlin", "Madrid")


def measured(run: Callable[[], T]) -> tuple[T, float]:
    """A result, and the processor seconds that it took."""
    start = time.process_time()
    found = run()
    return found, time.process_time() - start


def bytes_of(ledger: Ledger, number: int) -> int:
    """What an append has written: edit, equations, and line."""
    line = ledger.show(number)
    files = [ledger.edit_path(line.edit.id), ledger.equations_path(line.edit.id)]
    text = json.dumps(line.to_json(), ensure_ascii=False)
    return sum(file.stat().st_size for file in files if file.exists()) + len(text.encode())


def grown(method: Any, folder: Path, count: int) -> tuple[Ledger, list[float], list[int]]:
    """A ledger of so many edits, with processor seconds and bytes of each append."""
    ledger, seconds, sizes = Ledger(folder), [], []
    with ledger.applied(method.base):
        for number in range(count):
            subject = f"Person {number:05d}"
            fact = EditRequest(f"{subject} lives in", CITIES[number % len(CITIES)], subject)

            def append(fact: EditRequest = fact) -> None:
                line = ledger.append(method, [fact])
                ledger.load(line.edit, method.base).apply()

            seconds.append(measured(append)[1])
            sizes.append(bytes_of(ledger, number + 1))
            if (number + 1) % 1000 == 0:
                print(
                    f"{number + 1} edits, {statistics.median(seconds[-WINDOW:]):.4f} s", flush=True
                )
    return ledger, seconds, sizes


def growth(base: BaseModel, folder: Path, count: int) -> dict[str, float]:
    """What appends and reverts cost on a ledger of so many edits."""
    settings: dict[str, Any] = {"layers": [len(base.layout) // 2], "steps": 1, "contexts": 0}
    method = MEMIT(base_model=base, **settings)
    ledger, seconds, sizes = grown(method, folder / "ledger", count)
    window = min(WINDOW, count // 4)
    first, last = seconds[WARM_UP : WARM_UP + window], seconds[-window:]
    early = Ledger(folder / "early")
    for line in ledger.entries[: min(REPLAYED, count)]:
        early.append(method, line.requests)
    _, replay = measured(lambda: early.replay(base))
    replay *= count / len(early.lines)
    opened, opening = measured(lambda: Ledger(ledger.path))
    _, loading = measured(lambda: opened.edits(base))
    _, middle = measured(lambda: opened.revert(count // 2, base))
    _, lowest = measured(lambda: Ledger(ledger.path).revert(1, base))
    return {
        "edits": count,
        "seconds of an append, first": statistics.median(first),
        "seconds of an append, last": statistics.median(last),
        "times": statistics.median(last) / statistics.median(first),
        "bytes of an append, first": statistics.median(sizes[WARM_UP : WARM_UP + window]),
        "bytes of an append, last": statistics.median(sizes[-window:]),
        "seconds to read the lines": opening,
        "seconds to load all edits": loading,
        "seconds to replay all": replay,
        "seconds to revert the middle one": middle,
        "share of replaying, middle": middle / replay,
        "seconds to revert the first": lowest,
        "share of replaying, first": lowest / replay,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--base_model", default="nano")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        found = growth(BaseModel.load(given.base_model), Path(folder), given.count)
    for name, value in found.items():
        print(f"{name}: {value:.5g}")


if __name__ == "__main__":
    main()
