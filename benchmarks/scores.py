"""What each method does to facts: a table of scores with 95 % intervals.

    python benchmarks/scores.py                                  100 facts of NanoFacts' test split
    python benchmarks/scores.py --real ../shared/data --limit 50 CounterFact and zsRE records
    python benchmarks/scores.py --mode batch --limit 200         200 facts in one edit
    python benchmarks/scores.py --mode sequential --limit 200 --chunk-size 20 --against MEMIT
    python benchmarks/scores.py --methods MEND MEND:checkpoint=none variants/eamet
    python benchmarks/scores.py --models nano nano:dtype=bfloat16 nano:quantization=4bit

Every method runs with its defaults, unless settings follow its name or it is named as a packaged
config; those that must be fitted first run only when they are named.  Models are named with the
options of ``BaseModelSpec`` that they are loaded with.  Sequences are scored at their
end.  ``rewrite`` and ``rephrase`` are the share of cases whose answer tokens are all arg-max,
``free`` the share of free answers that are exactly the wanted one, ``known`` the share of
neighbouring facts that were right before and still are, ``kept`` the share of arg-max tokens along
the base model's own answers to locality prompts that are unchanged.  ``--against`` adds the mean
difference of rewrites from those of another method on the same facts.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer

from kedit_lightning import BaseModel, EditTrainer, methods
from kedit_lightning.benchmark import EditCallback, Protocol
from kedit_lightning.data import CounterFact, EditDataModule, NanoFacts, ZsRE
from kedit_lightning.methods.method import EditMethod
from kedit_lightning.methods.training.trained_method import TrainedMethod
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.metrics.functional import paired_difference

#: Name of a column, and the score it shows.
COLUMNS = {
    "rewrite": "rewrite/tf_all",
    "free": "rewrite/gen_em",
    "rephrase": "rephrase/tf_all",
    "known": "locality/neighborhood/known",
    "kept": "locality/keep_top1",
    "portability": "portability/tf_all",
}


#: Each fact under an edit of its own.
SINGLE = Protocol(mode="single", chunk_size=16)


class Line(NamedTuple):
    """One line of the table: scores as ``(mean, low, high)`` by column, and seconds an edit."""

    model: str
    data: str
    method: str
    scores: dict[str, tuple[float, float, float]]
    seconds: float
    written: dict[str, float]


class Written(EditCallback):
    """Keeps which rewrites are right in the end, by example."""

    def __init__(self) -> None:
        self.by_id: dict[str, float] = {}

    def on_example_result(
        self, trainer: Trainer, pl_module: LightningModule, record: ExampleRecord, edit: object
    ) -> None:
        """Take the last record of each example."""
        right = [bool(p["after"]["tf_all"]) for p in record["probes"] if p["kind"] == "rewrite"]
        self.by_id[record["id"]] = sum(right) / len(right)


def real_data(folder: Path, limit: int) -> dict[str, EditDataModule]:
    """The real data sets, by name."""
    return {
        "CounterFact": CounterFact(
            path=folder / "counterfact" / "counterfact_rome_format_1031.json", limit=limit
        ),
        "zsRE": ZsRE(path=folder / "zsre" / "zsre_mend_edit.json", limit=limit),
    }


def ready() -> list[str]:
    """The methods that edit well without a fit of one's own."""
    kinds = {name: getattr(methods, name) for name in methods.METHODS}
    return [n for n, kind in kinds.items() if not issubclass(kind, TrainedMethod) or kind.packaged]


def run(
    models: Sequence[str],
    data: dict[str, EditDataModule],
    names: Sequence[str],
    protocol: Protocol = SINGLE,
) -> Iterator[Line]:
    """Test every method on every data set and model."""
    for model in models:
        base = load(model)
        for label, datamodule in data.items():
            for name in names:
                yield score(base, label, datamodule, name, protocol)


def load(model: str) -> BaseModel:
    """A base model by its name, or ``NAME:option=value:...``."""
    name, *given = model.split(":")
    options: dict[str, str] = dict(option.split("=", 1) for option in given)  # type: ignore[misc]
    base = BaseModel.load(name, **options)
    base.name = model
    return base


def create(base: BaseModel, name: str) -> EditMethod:
    """A method by its name, ``NAME:setting=value:...``, or the name of a packaged config."""
    if "/" in name.partition(":")[0]:
        text = (files("kedit_lightning.configs") / f"{name}.yaml").read_text(encoding="utf-8")
        model = yaml.safe_load(text)["model"]
        kind, settings = model["class_path"], model["init_args"]
    else:
        kind, *given = name.split(":")
        settings = {key: yaml.safe_load(value) for key, value in (g.split("=", 1) for g in given)}
    method: EditMethod = getattr(methods, kind)(base_model=base, **settings)
    return method


def score(
    base: BaseModel, label: str, datamodule: EditDataModule, name: str, protocol: Protocol
) -> Line:
    """Test one method."""
    written = Written()
    trainer = EditTrainer(
        protocol=protocol,
        callbacks=[written],
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu" if not torch.cuda.is_available() else "auto",
    )
    method = create(base, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.test(method, datamodule, verbose=False)
    stage = "final/" if protocol.grouping == "sequential" else ""
    rows = {row.key.removeprefix(stage): row for row in method.summary}
    scores = {
        column: (rows[key].mean, rows[key].low, rows[key].high)
        for column, key in COLUMNS.items()
        if key in rows
    }
    # Costs belong to an edit, not to a stage.
    seconds = rows["timing/edit_seconds"].mean if "timing/edit_seconds" in rows else math.nan
    return Line(Path(base.name).name, label, name, scores, seconds, written.by_id)


def markdown(line: Line) -> str:
    """A line of the table."""
    cells = []
    for column in COLUMNS:
        if column in line.scores:
            mean, low, high = line.scores[column]
            cells.append(f"{mean:.2f} ({low:.2f}–{high:.2f})")
        else:
            cells.append("–")
    seconds = f"{line.seconds:.2f}" if math.isfinite(line.seconds) else "–"
    return " | ".join(["", line.model, line.data, line.method, *cells, seconds, ""]).strip()


def compared(lines: Sequence[Line], against: str | None) -> Iterator[str]:
    """Differences of rewrites from those of one method, with their intervals."""
    for other in (line for line in lines if line.method == against):
        for line in lines:
            if line[:2] == other[:2] and line.method != against:
                pairs = [(line.written[id], other.written[id]) for id in other.written]
                mean, low, high = paired_difference(*zip(*pairs, strict=True))
                shown = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
                yield f"\n{line.method} - {against}, rewrite on {line.data}: {shown}"


def header() -> str:
    """Head of the table."""
    names = ["model", "data", "method", *COLUMNS, "s/edit"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def main() -> None:
    """Print the table, a line as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=ready(), help="see above")
    parser.add_argument(
        "--models", nargs="+", help="names or folders, and options; nano if not given"
    )
    parser.add_argument("--facts", type=Path, help="file of records in place of NanoFacts' own")
    parser.add_argument("--real", type=Path, help="folder with the real data sets")
    parser.add_argument("--limit", type=int, default=100, help="records of each data set")
    parser.add_argument("--mode", default="single", choices=("single", "batch", "sequential"))
    parser.add_argument("--chunk-size", type=int, help="facts of an edit; all if not given")
    parser.add_argument("--against", help="method whose rewrites the others' are compared with")
    args = parser.parse_args()
    models, data = (
        args.models or ["nano"],
        {"NanoFacts": NanoFacts(path=args.facts, limit=args.limit, seed=0)},
    )
    if args.real:
        data = real_data(args.real, args.limit)
        models = args.models or ["nano", str(args.real / "models" / "stories260K")]
    started = time.perf_counter()
    print(header())
    protocol = SINGLE
    if args.mode != "single":
        size = args.chunk_size or args.limit
        protocol = Protocol(mode=args.mode, chunk_size=size, evaluate="final")
    lines = []
    for line in run(models, data, args.methods, protocol):
        print(markdown(line), flush=True)
        lines.append(line)
    for line in compared(lines, args.against):
        print(line)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
