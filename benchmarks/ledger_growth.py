"""Whether a ledger of thousands of edits costs as much to write to as an empty one.

    python benchmarks/ledger_growth.py --count 10000

Writes facts one after another into a ledger, the edits applied as they come, then takes one out.
They are MEMIT's solutions for keys and residuals drawn at random, so that what is measured is the
ledger's own cost; with ``--compute`` MEMIT computes those that are compared, the first and the
last, from their facts. Processor time, so that other work on the machine does not count. Replaying
is measured on ten edits that MEMIT has computed, and taken to cost as much for each of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.edits import EditOrigin, LowRankEdit
from kedit_lightning.edits.projections import projection_shape
from kedit_lightning.methods import MEMIT
from kedit_lightning.methods.locate.shared.equations import Equation
from kedit_lightning.runs import Ledger
from kedit_lightning.runs.ledger_facts import new_facts
from kedit_lightning.runs.ledger_lines import Randomness

T = TypeVar("T")
#: Appends at either end whose median is compared, and those before them that only warm up.
WINDOW, WARM_UP = 100, 20
#: Edits that are replayed to measure what one costs.
REPLAYED = 10
CITIES = ("Rome", "Paris", "Oslo", "Berlin", "Madrid")


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


def drawn(method: MEMIT, origin: EditOrigin, fact: EditRequest) -> LowRankEdit:
    """The edit of a fact whose key and residual are drawn at random."""
    (layer,), (module,) = method.layers, method.edited
    d_in, d_out = projection_shape(method.base.module(module))
    key = torch.randn(1, d_in, dtype=torch.float64)
    equation = Equation(key, key, torch.randn(1, d_out, dtype=torch.float64))
    delta = method.solution(module, equation, method.cost(layer, module, key.T, []))
    origin = replace(origin, requests=(fact,), stack=method.base.edits.mark)
    edit = LowRankEdit(method.base, {module: delta.to(torch.float32)}, origin)
    edit.equations = equation.tensors(module, torch.float32)
    return edit


def grown(
    method: MEMIT, folder: Path, count: int, compute: bool
) -> tuple[Ledger, list[float], list[int]]:
    """A ledger of so many edits, with processor seconds and bytes of each append."""
    method.configure_model()
    origin = method.origin([])
    ends = {*range(WARM_UP + WINDOW), *range(count - WINDOW, count)} if compute else set()
    ledger, seconds, sizes = Ledger(folder), [], []
    with ledger.applied(method.base):
        for number in range(count):
            subject = f"Person {number:05d}"
            fact = EditRequest(f"{subject} lives in", CITIES[number % len(CITIES)], subject)

            def append(fact: EditRequest = fact, computed: bool = number in ends) -> None:
                if computed:
                    ledger.append(method, [fact])
                else:
                    with ledger.writing():
                        new_facts(ledger.state.facts, [fact], ledger.path)
                        edit = drawn(method, origin, fact)
                        ledger.write(method, edit, Randomness(0, fact.prompt))
                ledger.load(ledger.lines[-1].edit, method.base, force=True).apply()

            seconds.append(measured(append)[1])
            sizes.append(bytes_of(ledger, number + 1))
            if (number + 1) % 1000 == 0:
                print(
                    f"{number + 1} edits, {statistics.median(seconds[-WINDOW:]):.4f} s", flush=True
                )
    return ledger, seconds, sizes


def growth(base: BaseModel, folder: Path, count: int, compute: bool) -> dict[str, float]:
    """What appends and reverts cost on a ledger of so many edits; printed as they come."""
    found: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        found[name] = value
        print(f"{name}: {value:.5g}", flush=True)

    # without early stop, so that each fact takes as many steps
    method = MEMIT(base_model=base, layers=[len(base.layout) // 2], stop_loss=0.0)
    ledger, seconds, sizes = grown(method, folder / "ledger", count, compute)
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
    return found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--compute", action="store_true", help="compute the edits at both ends")
    parser.add_argument("--base_model", default="nano")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    base = BaseModel.load(given.base_model)
    with tempfile.TemporaryDirectory() as folder:
        growth(base, Path(folder), given.count, given.compute)


if __name__ == "__main__":
    main()
