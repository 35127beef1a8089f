"""What single edits of each method do: a table of scores with 95 % intervals.

    python benchmarks/scores.py                                  100 facts of NanoFacts' test split
    python benchmarks/scores.py --real ../shared/data --limit 50 CounterFact and zsRE records

Every method runs with its defaults.  ``rewrite`` and ``rephrase`` are the share of cases whose
answer tokens are all arg-max, ``free`` the share of free answers that are exactly the wanted one,
``known`` the share of neighbouring facts that were right before and still are, ``kept`` the share
of arg-max tokens along the base model's own answers to locality prompts that are unchanged.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kedit_lightning import BaseModel, EditTrainer, methods
from kedit_lightning.data import CounterFact, EditDataModule, NanoFacts, ZsRE
from kedit_lightning.evaluation import Protocol

#: Name of a column, and the score it shows.
COLUMNS = {
    "rewrite": "rewrite/tf_all",
    "free": "rewrite/gen_em",
    "rephrase": "rephrase/tf_all",
    "known": "locality/neighborhood/known",
    "kept": "locality/keep_top1",
    "portability": "portability/tf_all",
}


class Line(NamedTuple):
    """One line of the table: scores as ``(mean, low, high)`` by column, and seconds an edit."""

    model: str
    data: str
    method: str
    scores: dict[str, tuple[float, float, float]]
    seconds: float


def real_data(folder: Path, limit: int) -> dict[str, EditDataModule]:
    """The real data sets, by name."""
    return {
        "CounterFact": CounterFact(
            path=folder / "counterfact" / "counterfact_rome_format_1031.json", limit=limit
        ),
        "zsRE": ZsRE(path=folder / "zsre" / "zsre_mend_edit.json", limit=limit),
    }


def run(
    models: Sequence[str], data: dict[str, EditDataModule], names: Sequence[str]
) -> Iterator[Line]:
    """Test every method on every data set and model."""
    for model in models:
        base = BaseModel.load(model)
        for label, datamodule in data.items():
            for name in names:
                yield score(base, label, datamodule, name)


def score(base: BaseModel, label: str, datamodule: EditDataModule, name: str) -> Line:
    """Test one method."""
    trainer = EditTrainer(
        protocol=Protocol(mode="single", chunk_size=16),
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu" if not torch.cuda.is_available() else "auto",
    )
    method = getattr(methods, name)(base_model=base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.test(method, datamodule, verbose=False)
    rows = {row.key: row for row in method.summary}
    scores = {
        column: (rows[key].mean, rows[key].low, rows[key].high)
        for column, key in COLUMNS.items()
        if key in rows
    }
    return Line(Path(base.name).name, label, name, scores, rows["timing/edit_seconds"].mean)


def markdown(line: Line) -> str:
    """A line of the table."""
    cells = []
    for column in COLUMNS:
        if column in line.scores:
            mean, low, high = line.scores[column]
            cells.append(f"{mean:.2f} ({low:.2f}–{high:.2f})")
        else:
            cells.append("–")
    return " | ".join(
        ["", line.model, line.data, line.method, *cells, f"{line.seconds:.2f}", ""]
    ).strip()


def header() -> str:
    """Head of the table."""
    names = ["model", "data", "method", *COLUMNS, "s/edit"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def main() -> None:
    """Print the table, a line as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=methods.METHODS, choices=methods.METHODS)
    parser.add_argument("--models", nargs="+", help="names or folders; nano if not given")
    parser.add_argument("--real", type=Path, help="folder with the real data sets")
    parser.add_argument("--limit", type=int, default=100, help="records of each data set")
    args = parser.parse_args()
    models, data = args.models or ["nano"], {"NanoFacts": NanoFacts(limit=args.limit, seed=0)}
    if args.real:
        data = real_data(args.real, args.limit)
        models = args.models or ["nano", str(args.real / "models" / "stories260K")]
    started = time.perf_counter()
    print(header())
    for line in run(models, data, args.methods):
        print(markdown(line), flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
