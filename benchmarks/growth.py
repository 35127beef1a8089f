r"""How costs grow with the edits that are applied already.

    python benchmarks/growth.py
    python benchmarks/growth.py --sizes 0 300 --methods GRACE

Edits of made-up content stand on `nano`: codebook entries (GRACE) or rank-one changes (ROME's
form).  Printed are the milliseconds of processor time that it takes to apply one more, to make the
first pass under it, and to roll it back; those of ten free answers of ten tokens; and the bytes of
the header of the last edit's file.  Medians of 16, of the answers of five.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch

from kedit_lightning import BaseModel, Edit
from kedit_lightning.edits import CodebookEdit, EditOrigin, LowRankEdit
from kedit_lightning.edits.kinds.codebook.codebook import CodebookEntry

REPEATS, ANSWERS = 16, 5


def codebook_entry(base: BaseModel, number: int) -> Edit:
    """An edit with one entry that no prompt is near to."""
    name, shape = projection(base)
    key, value = torch.randn(shape[1]) * 100, torch.randn(shape[0])
    entry = CodebookEntry(key, value, (number,), 1e-3)
    return CodebookEdit(base, name, [entry], origin=origin(base))


def rank_one(base: BaseModel, number: int) -> Edit:
    """A small change of one matrix."""
    name, shape = projection(base)
    factors = torch.randn(1, shape[1]) * 1e-4, torch.randn(shape[0], 1) * 1e-4
    return LowRankEdit(base, {name: factors}, origin(base))


def origin(base: BaseModel) -> EditOrigin:
    """What a method says of where an edit comes from."""
    return EditOrigin("growth", stack=base.edits.mark)


def projection(base: BaseModel) -> tuple[str, torch.Size]:
    """The down projection of a block in the middle, and the shape of its weight."""
    name = base.layout.dense_blocks[3].down
    return name, base.model.get_parameter(f"{name}.weight").shape


EDITS = {"GRACE": codebook_entry, "ROME": rank_one}


def milliseconds(works: Sequence[Callable[[], object]]) -> float:
    """Median processor time of some works."""
    spent = []
    for work in works:
        start = time.process_time()
        work()
        spent.append((time.process_time() - start) * 1000)
    return statistics.median(spent)


def header_bytes(edit: Edit) -> int:
    """Size of what the file of an edit says of where it comes from."""
    return len(json.dumps(edit.origin.to_json()).encode())


def line(base: BaseModel, method: str, size: int, answers: Callable[[], object]) -> str:
    """Measure with ``size`` edits on the stack; one line of the table."""
    made: Callable[[BaseModel, int], Edit] = EDITS[method]
    first = base.rows(["The capital of France is"])
    with base.edits.restored(), torch.no_grad():
        for number in range(size):
            made(base, number).apply()
        answers()
        answering = milliseconds([answers] * ANSWERS)
        applying, passing, rolling = [], [], []
        for number in range(size, size + REPEATS):
            edit = made(base, number)
            applying.append(milliseconds([edit.apply]))
            passing.append(milliseconds([lambda: base.forward(first)]))
            rolling.append(milliseconds([edit.rollback]))
            edit.apply()
        times = [statistics.median(some) for some in (applying, passing, rolling)]
    figures = " | ".join(f"{each:.2f}" for each in times)
    return f"| {method} | {size} | {figures} | {answering:.0f} | {header_bytes(edit)} |"


def main() -> None:
    """Print one line for each kind of edit and size of the stack."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(EDITS), choices=EDITS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 1000, 10000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    base = BaseModel.load("nano")
    prompts = [f"The {word} of France is" for word in "abcdefghij"]

    def answers() -> None:
        base.generate(prompts, max_new_tokens=10, min_new_tokens=10)

    columns = ["form", "edits", "apply, ms", "first pass, ms", "roll back, ms"]
    columns += ["ten answers, ms", "header, bytes"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for method in options.methods:
        for size in options.sizes:
            print(line(base, method, size, answers), flush=True)


if __name__ == "__main__":
    main()
