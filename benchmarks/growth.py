r"""How costs grow with the edits that are applied already.

    python benchmarks/growth.py
    python benchmarks/growth.py --sizes 0 1000 10000 --methods GRACE

Edits of made-up content stand on `nano`: codebook entries (GRACE) or rank-one changes (ROME's
form).  Printed are the milliseconds of processor time that it takes to apply one more and to roll
it back, and those of ten free answers of ten tokens; medians of five.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch

from kedit_lightning import BaseModel, Edit
from kedit_lightning.edits import CodebookEdit, LowRankEdit
from kedit_lightning.edits.kinds.codebook.codebook import CodebookEntry

REPEATS = 5


def codebook_entry(base: BaseModel, number: int) -> Edit:
    """An edit with one entry that no prompt is near to."""
    name, shape = projection(base)
    key, value = torch.randn(shape[1]) * 100, torch.randn(shape[0])
    return CodebookEdit(base, name, [CodebookEntry(key, value, (number,), 1e-3)])


def rank_one(base: BaseModel, number: int) -> Edit:
    """A small change of one matrix."""
    name, shape = projection(base)
    factors = torch.randn(1, shape[1]) * 1e-4, torch.randn(shape[0], 1) * 1e-4
    return LowRankEdit(base, {name: factors})


def projection(base: BaseModel) -> tuple[str, torch.Size]:
    """The down projection of a block in the middle, and the shape of its weight."""
    name = base.layout.dense_blocks[3].down
    return name, base.module(name).weight.shape


EDITS = {"GRACE": codebook_entry, "ROME": rank_one}


def milliseconds(work: Callable[[], object]) -> float:
    """Median processor time of some work."""
    spent = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        spent.append((time.process_time() - start) * 1000)
    return statistics.median(spent)


def main() -> None:
    """Print one line for each kind of edit and size of the stack."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(EDITS), choices=EDITS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 100, 300, 1000, 3000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    base = BaseModel.load("nano")
    prompts = [f"The {word} of France is" for word in "abcdefghij"]

    def answers() -> None:
        base.generate(prompts, max_new_tokens=10, min_new_tokens=10)

    print("| form | edits | apply one more, ms | and roll it back, ms | ten answers, ms |")
    print("|---|---|---|---|---|")
    for method in options.methods:
        for size in options.sizes:
            with base.edits.restored():
                for number in range(len(base.edits), size):
                    EDITS[method](base, number).apply()
                answers()
                more = iter([EDITS[method](base, size + n) for n in range(REPEATS)])
                applied: list[Edit] = []
                applying = milliseconds(lambda: applied.append(next(more).apply()))  # noqa: B023
                rolling = milliseconds(lambda: applied.pop().rollback())  # noqa: B023
                figures = f"{applying:.2f} | {rolling:.2f} | {milliseconds(answers):.0f}"
                print(f"| {method} | {size} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
