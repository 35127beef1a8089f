"""Whether a ledger of thousands of edits costs as much to write to as an empty one.

    python benchmarks/ledger_growth.py --count 10000

Writes facts one after another with MEMIT into a ledger, the edits applied as they come, then takes
one out. Processor time, so that other work on the machine does not count. Replaying is measured on
the first edits, and taken to cost as much for each of the others.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.methods import MEMIT
from kedit_lightning.runs import Ledger

T = TypeVar("T")
#: Sizes of the model that the edits of the stream are written into, with the tokenizer of nano.
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
#: Appends at either end whose median is compared, and those before them that only warm up.
WINDOW, WARM_UP = 100, 20
#: Edits that are replayed to measure what one costs.
REPLAYED = 100
CITIES = ("Rome", "Paris", "Oslo", "Berlin", "Madrid")


def tiny() -> BaseModel:
    """A model so small that the ledger's own costs show beside those of the method."""
    torch.manual_seed(0)
    nano = BaseModel.load("nano")
    config = copy.deepcopy(nano.model.config)
    for name, value in TINY.items():
        setattr(config, name, value)
    config.layer_types = None
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return BaseModel(model, nano.tokenizer, name="tiny")


def measured(run: Callable[[], T]) -> tuple[T, float]:
    """A result, and the processor seconds that it took."""
    start = time.process_time()
    found = run()
    return found, time.process_time() - start


def bytes_of(ledger: Ledger, number: int) -> int:
    """What an append has written: edit, equations, and line."""
    line = ledger.entry(number)
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
                ledger.load(line.edit, method.base, force=True).apply()

            seconds.append(measured(append)[1])
            sizes.append(bytes_of(ledger, number + 1))
            if (number + 1) % 1000 == 0:
                print(
                    f"{number + 1} edits, {statistics.median(seconds[-WINDOW:]):.4f} s", flush=True
                )
    return ledger, seconds, sizes


def growth(base: BaseModel, folder: Path, count: int) -> dict[str, float]:
    """What appends and reverts cost on a ledger of so many edits; printed as they come."""
    found: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        found[name] = value
        print(f"{name}: {value:.5g}", flush=True)

    settings: dict[str, Any] = {"steps": 1, "contexts": 0, "statistics": "identity"}
    settings |= {"layers": [len(base.layout) // 2], "preserve": 1.0}
    method = MEMIT(base_model=base, **settings)
    ledger, seconds, sizes = grown(method, folder / "ledger", count)
    window = min(WINDOW, count // 4)
    begin, end = slice(WARM_UP, WARM_UP + window), slice(count - window, count)
    first, last = (statistics.median(seconds[part]) for part in (begin, end))
    note("seconds of an append, first", first)
    note("seconds of an append, last", last)
    note("times", last / first)
    note("bytes of an append, first", statistics.median(sizes[begin]))
    note("bytes of an append, last", statistics.median(sizes[end]))
    early = Ledger(folder / "early")
    for line in ledger.entries[: min(REPLAYED, count)]:
        early.append(method, line.requests)
    replay = measured(lambda: early.replay(base))[1] * count / len(early.lines)
    note("seconds to replay all", replay)
    opened, reading = measured(lambda: Ledger(ledger.path))
    note("seconds to read the lines", reading)
    reverted = measured(lambda: opened.revert(1, base))[1]
    note("seconds to revert the first", reverted)
    note("share of replaying", reverted / replay)
    opened, _ = measured(lambda: Ledger(ledger.path))
    reverted = measured(lambda: opened.revert(count // 2, base))[1]
    note("seconds to revert the middle one", reverted)
    note("share of replaying, middle", reverted / replay)
    return found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--base_model", help="a name instead of the tiny model")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    base = BaseModel.load(given.base_model) if given.base_model else tiny()
    with tempfile.TemporaryDirectory() as folder:
        growth(base, Path(folder), given.count)


if __name__ == "__main__":
    main()
