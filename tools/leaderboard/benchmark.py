"""The benchmark that anyone can repeat: `make benchmark`.

    make benchmark                                  everything, for hours
    make benchmark SUBSET=1                         a stated part, in at most two hours on two cores
    make benchmark PART=nano.nano_facts.single      what has this name; patterns with * too
    make benchmark PART='*.memit' DATA=~/data       another folder of real data
    python tools/leaderboard/benchmark.py --list    what would run, with its commands
    python tools/leaderboard/benchmark.py --page    the page of what has run so far
    python tools/leaderboard/benchmark.py --summary its figures as text, for benchmarks/RESULTS.md
    python tools/leaderboard/benchmark.py --reproduce 3 --seed 0

Finished cells are kept, so that the same command goes on after Ctrl-C, a kill or a crash. Settings
are chosen first, by `kedit sweep` on validation data; `--keep-settings` takes those that are there.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmark_cells import MODELS, ROOT, Cell, Plan, plan, turn
from benchmark_page import write_page
from benchmark_runs import Progress, finished, forked, run, take_settings
from benchmark_scores import collected
from benchmark_summary import summary

from kedit_lightning.analysis.reproduction import reproduction

#: Two numbers of a repeated run may be so far apart, as in `kedit reproduce`.
TOLERANCE = 1e-5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked, and write the page.

    Returns:
        1 if a repeated cell has other numbers, 2 if no cell has the name that was given.
    """
    given = _arguments(arguments)
    out = Path(given.output)
    found = plan(given.subset, given.part, given.data)
    if not found.cells:
        for reason in found.skipped:
            print(f"left out: {reason}", file=sys.stderr)
        print(f"error: no cell has the name '{given.part}'; --list shows all", file=sys.stderr)
        return 2
    if given.list:
        _list(found)
        return 0
    if given.reproduce:
        return _reproduced(found, out, given.reproduce, given.seed)
    if given.summary:
        print(summary(collected(found, out, given.subset)))
        return 0
    if not given.page:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the cell under way too
        import_module("kedit_lightning.cli.parser")  # once, before the copies of this process
        import_module("kedit_lightning.callbacks")
        import_module("kedit_lightning.methods")
        try:
            _run(found, out, given)
        except KeyboardInterrupt:
            print("interrupted: finished cells are kept, and the same command goes on")
            return 130
    # Of all that has run, whatever part was asked for now.
    content = collected(plan(given.subset, folder=given.data), out, given.subset)
    if not content["cells"]:
        print(f"no cell is finished in {out}, so the page stays as it is")
        return 0
    write_page(content, Path(given.page_folder))
    print(f"{given.page_folder}/index.html has {len(content['cells'])} cells")
    return 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", default="*", help="a name, its beginning, or a pattern")
    parser.add_argument("--subset", action="store_true", help="the stated subset")
    parser.add_argument("--data", default="../shared/data", help="folder of real data sets")
    parser.add_argument("--output", default=str(ROOT / "outputs" / "benchmark"))
    parser.add_argument("--page-folder", default=str(ROOT / "docs" / "leaderboard"))
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--summary", action="store_true", help="print the figures as Markdown")
    parser.add_argument("--keep-settings", action="store_true", help="choose no settings anew")
    parser.add_argument("--reproduce", type=int, default=0, help="repeat so many drawn cells")
    parser.add_argument("--seed", type=int, default=0, help="seed of that draw")
    given = parser.parse_args(arguments)
    given.part = given.part or "*"
    return given


def _list(found: Plan) -> None:
    for step in (*found.sweeps, *found.cells):
        print(f"{step.name}\n    {step.command}")
    for reason in found.skipped:
        print(f"left out: {reason}")


def _run(found: Plan, out: Path, given: argparse.Namespace) -> None:
    """Choose settings, and run the cells with what was chosen.

    The cells of a method follow its sweep, so that an early end leaves whole methods.
    """
    sweeps = () if given.keep_settings else found.sweeps
    wanted = [step for step in sweeps if finished(step, out / "sweeps") is None]
    progress = Progress([*wanted, *(c for c in found.cells if not _is_done(c, out))])
    print(f"{len(found.cells)} cells and {len(sweeps)} choices of settings; "
          f"{len(wanted)} of these and {progress.total - len(wanted)} cells are left")  # fmt: skip
    for reason in found.skipped:
        print(f"left out: {reason}")
    pairs = sorted({(cell.model, cell.method) for cell in found.cells},
                   key=lambda pair: (MODELS.index(pair[0]), turn(pair[1])))  # fmt: skip
    for model, method in pairs:
        for sweep in (s for s in sweeps if (s.model, s.method) == (model, method)):
            if sweep in wanted:
                print(progress.tell(run(sweep, out / "sweeps", forked)), flush=True)
            take_settings(sweep, out / "sweeps")
        again = plan(given.subset, given.part, given.data).cells
        for cell in (c for c in again if (c.model, c.method) == (model, method)):
            if not _is_done(cell, out):
                print(progress.tell(run(cell, out / "cells", forked)), flush=True)


def _is_done(cell: Cell, out: Path) -> bool:
    return finished(cell, out / "cells") is not None


def _reproduced(found: Plan, out: Path, count: int, seed: int) -> int:
    """Repeat drawn cells by their own commands, and compare them number by number."""
    import_module("kedit_lightning.cli.parser")
    marks = {cell: finished(cell, out / "cells") for cell in found.cells}
    whole = [cell for cell, mark in marks.items() if mark is not None and "error" not in mark]
    if len(whole) < count:
        raise SystemExit(f"error: {len(whole)} cells are finished, and {count} were to be drawn")
    drawn = random.Random(seed).sample(sorted(whole, key=lambda cell: cell.name), count)
    differing = 0
    for cell in drawn:
        first, second = out / "cells" / cell.name, out / "reproduced" / cell.name
        shutil.rmtree(second, ignore_errors=True)
        second.parent.mkdir(parents=True, exist_ok=True)
        ended = forked(cell.arguments(str(second)), second.with_suffix(second.suffix + ".log"))
        if ended.code:
            raise SystemExit(f"{cell.name} ended with exit status {ended.code}; its log says why")
        pairs = [(first, second)]
        pairs += [(order, second / "orders" / order.name) for order in first.glob("orders/*")]
        same = [reproduction(*pair, TOLERANCE) for pair in pairs]
        equal = all(one.equal for one in same)
        differing += not equal
        readings = sum(one.readings for one in same)
        print(f"{cell.name}: {'equal' if equal else 'DIFFERS'}, {readings:,} readings, "
              f"{sum(one.rounded for one in same)} of them by rounding", flush=True)  # fmt: skip
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
