"""What the choices that papers make differently move, each alone, in points with intervals.

    python benchmarks/disagreements.py                           all choices on nano, about an hour
    python benchmarks/disagreements.py --choices layer --methods ROME
    python benchmarks/disagreements.py --model FOLDER --facts FILE --draw docs/disagreements.png

``--draw`` makes two pictures, of how facts are written and (``_scoring``) of how they are scored.
Each run of a method is kept under ``--output`` and is not repeated, so a run that was ended
continues. ``exact`` is a free answer that is the wanted one and stops, ``forced`` all answer tokens
arg-max, ``cut`` a free answer that begins with the wanted one, as one cut at its length does.
``names`` are answers of several tokens that the model never saw. The table says what the second
choice has more than the first, in percentage points, paired by question, with facts as clusters.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from forest_plot import draw_moved
from lightning.pytorch import LightningModule, Trainer
from paired_choices import (
    ORDER,
    PANELS,
    Cell,
    Choices,
    Moved,
    Pair,
    Side,
    Sizes,
    measured,
    order_spread,
    values_of,
)
from scores import create, load

from kedit_lightning import BaseModel, EditTrainer
from kedit_lightning.analysis.causal_trace import trace
from kedit_lightning.benchmark import EditCallback, Protocol
from kedit_lightning.data import NanoFacts
from kedit_lightning.data.records import Fields
from kedit_lightning.methods import FTM
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.metrics.example_record import ProbeRecord
from kedit_lightning.metrics.scores.answers import (
    ExactMatch,
    GenerationContains,
    GenerationExact,
    ProbabilityPreference,
    TokenMatch,
)
from kedit_lightning.metrics.scores.locality import StillKnown, UnchangedText, UnchangedTop1
from kedit_lightning.requests import EditExample

METHODS = ["FTM", "LoRA", "ROME", "MEMIT", "AlphaEdit", "GRACE", "MEND"]
#: Those of names, with the settings they need for them. ROME and MEMIT, which optimise one hidden
#: state, write none into nano; neither does GRACE, whose rows show which scores see that.
NAMES = {"FTM": "FTM:steps=100", "LoRA": "LoRA", "GRACE": "GRACE"}
SCORES = {
    "token_share": TokenMatch,
    "forced": ExactMatch,
    "exact": GenerationExact,
    "contained": GenerationContains,
    "likelier": ProbabilityPreference,
    "same_text": UnchangedText,
    "same_top1": UnchangedTop1,
    "known": StillKnown,
}
_SYLLABLES = ["ba", "de", "fi", "go", "ka", "le", "mi", "no", "pa", "re", "si", "to", "va", "zu"]


def invented_name(key: str) -> str:
    """A name of two words that no text has, the same for the same key."""
    draw = random.Random(f"name of {key}")
    words = ["".join(draw.choices(_SYLLABLES, k=length)) for length in (3, 2)]
    return " ".join(word.capitalize() for word in words)


def begins_with(text: str, answer: str) -> bool:
    """Whether a free answer, cut at the length of the wanted one, is the wanted one.

    >>> begins_with(" Rome and Milan", "Rome"), begins_with(" rome", "Rome")
    (True, False)
    """
    return text.lstrip().startswith(answer)


class DisputedFacts(NanoFacts):
    """NanoFacts with other answers, or with the end-of-text token behind those to write.

    Probes never have the token, so that both are asked the same.
    """

    def __init__(self, answers: str, end: str, path: Path | None, limit: int) -> None:
        super().__init__(path=path, limit=limit, seed=0)
        self.answers, self.end = answers, end

    def parse(self, fields: Fields, id: str) -> EditExample:
        """The example of a record, changed."""
        example = super().parse(fields, id)
        (request,) = example.requests
        new = invented_name(id) if self.answers == "names" else request.target_new
        probes = []
        for probe in example.probes:
            if probe.kind in ("rewrite", "rephrase"):
                probe = replace(probe, answers=(new,))
            elif probe.contrast is not None:
                probe = replace(probe, contrast=new)
            probes.append(probe)
        return EditExample((replace(request, target_new=new + self.end),), tuple(probes), id)


class Cases(EditCallback):
    """Keeps the scores of each probe."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_example_result(
        self, trainer: Trainer, pl_module: LightningModule, record: ExampleRecord, edit: object
    ) -> None:
        """Take the scores of one example."""
        counts: dict[tuple[str, str], int] = {}
        for probe in record["probes"]:
            place = probe["kind"], probe["group"]
            counts[place] = counts.get(place, -1) + 1
            case = {"fact": record["id"], "stage": record["stage"], "kind": place[0]}
            case |= {"group": place[1], "number": counts[place], "scores": scores_of(probe)}
            self.found.append(case)


def scores_of(probe: ProbeRecord) -> dict[str, float | None]:
    """The scores of one probe, by name."""
    found = {
        name: None if probe["kind"] not in score.kinds else score.read(probe)
        for name, score in SCORES.items()
    }
    text = probe["after"].get("text")
    cut = None if text is None or not probe["answers"] else begins_with(text, probe["answers"][0])
    found["cut"] = None if cut is None else float(cut)
    if probe["kind"] == "locality" and probe["contrast"] is not None:
        found["likelier"] = ProbabilityPreference.read(probe)
    return found


def run_cell(base: BaseModel, cell: Cell, facts: Path | None) -> dict[str, Any]:
    """Run a method on the facts of a cell."""
    end = str(base.tokenizer.eos_token) if cell.eos else ""
    data = DisputedFacts(cell.answers, end, facts, cell.facts)
    several = {} if cell.mode == "single" else {"chunk_size": cell.chunk}
    if cell.mode == "sequential":
        several |= {"order": cell.order}
        several |= {"evaluate": "final" if cell.order else "immediate,final"}
    cases = Cases()
    trainer = EditTrainer(
        protocol=Protocol(mode=cell.mode, **several),
        callbacks=[cases],
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    method = create(base, cell.method)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.test(method, data, verbose=False)
    seconds = time.process_time() - started
    return {"cell": asdict(cell), "seconds": seconds, "cases": cases.found}


class Runs:
    """Finished runs, kept in a folder; a missing one is run."""

    def __init__(self, base: BaseModel, folder: Path, facts: Path | None) -> None:
        self.base, self.folder, self.facts = base, folder, facts
        self.known: dict[str, dict[str, Any]] = {}

    def has(self, cell: Cell) -> bool:
        """Whether a cell has been run."""
        return (self.folder / f"{cell.name}.json").is_file()

    def read(self, cell: Cell) -> dict[str, Any]:
        """The run of a cell."""
        if cell.name not in self.known:
            path = self.folder / f"{cell.name}.json"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(run_cell(self.base, cell, self.facts)))
            self.known[cell.name] = json.loads(path.read_text())
        return self.known[cell.name]


def other_layers(base: BaseModel, methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """For methods the settings of each other layer, or of a later range for MEMIT, by label."""
    depth = len(base.layout)
    found: dict[str, dict[str, str]] = {}
    for name in methods:
        if name not in ("FTM", "ROME", "MEMIT"):
            continue
        method: Any = create(base, name)
        method.configure_model()
        given = method.settings.layers if isinstance(method, FTM) else method.layers
        chosen = [layer % depth for layer in given]
        size, option = len(chosen), "layer={}" if name == "ROME" else "layers={}"
        ranges = [list(range(first, first + size)) for first in range(depth - size + 1)]
        if size > 1:
            ranges = [places for places in ranges if abs(places[0] - chosen[0]) <= 2]
        found[name] = {}
        usual = _span(chosen)
        for places in ranges:
            label = _span(places)
            value = json.dumps(places if "layers" in option else places[0])
            if places != chosen:
                found[name][f"{label} not {usual}"] = f"{name}:{option.format(value)}"
    return found


def _span(layers: Sequence[int]) -> str:
    return "–".join(str(layer) for layer in dict.fromkeys((layers[0], layers[-1])))


def traced(base: BaseModel, facts: Path | None, count: int) -> dict[str, list[float]]:
    """Mean indirect effect of each layer at the subject's last token, by the kind of state."""
    found: dict[str, list[float]] = {}
    for kind in ("block", "mlp"):
        effects = []
        for example in NanoFacts(path=facts, limit=count, seed=0).examples("test"):
            (request,) = example.requests
            one = trace(base, request.prompt, str(request.subject), kind=kind)  # type: ignore[arg-type]
            effects.append(one.effect[:, one.subject[1]].tolist())
        found[kind] = [fmean(layer) for layer in zip(*effects, strict=True)]
    return found


def table(pairs: Sequence[Pair], found: Mapping[int, Mapping[str, Moved]]) -> Iterator[str]:
    """The table, in points."""
    yield f"| choice | of | {' | '.join(PANELS)} |\n|{'---|' * (len(PANELS) + 2)}"
    for number, pair in enumerate(pairs):
        cells = []
        for panel in PANELS:
            one = found[number].get(panel)
            cells.append(
                "" if one is None else f"{one.mean:+.0f} ({one.low:+.0f} to {one.high:+.0f})"
            )
        yield f"| {pair.choice} | {pair.label} | {' | '.join(cells)} |"


def spreads(pairs: Sequence[Pair], runs: Runs) -> dict[str, dict[str, dict[str, float]]]:
    """How far scores spread over the orders of a stream, by method and panel."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for pair in pairs:
        if pair.choice != ORDER:
            continue
        cells = (*pair.second.cells, *pair.first.cells)
        found[pair.label] = {
            panel: order_spread([values_of(Side((cell,)), panel, runs.read) for cell in cells])
            for panel in pair.panels
        }
    return found


def main() -> None:
    """Run what is missing, print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano", help="name or folder of the base model")
    parser.add_argument("--facts", type=Path, help="records in place of those of nano")
    parser.add_argument("--limit", type=int, default=100, help="facts of the usual run of a method")
    parser.add_argument("--changed", type=int, default=50, help="facts of runs with one change")
    parser.add_argument("--layer", type=int, default=50, help="facts of runs at another layer")
    parser.add_argument("--stream", type=int, default=40, help="facts of a sequence")
    parser.add_argument("--orders", type=int, default=5, help="orders of it, two at least")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--choices", nargs="+", help="beginnings of their names; all if not given")
    parser.add_argument("--finished", action="store_true", help="run nothing, show what has been")
    parser.add_argument("--output", type=Path, default=Path("outputs/disagreements"))
    parser.add_argument("--draw", type=Path, help="where the pictures go")
    parser.add_argument(
        "--beside", type=Path, nargs="*", default=[], help="results of other models to draw too"
    )
    args = parser.parse_args()
    base = load(args.model)
    runs = Runs(base, args.output / Path(args.model).name, args.facts)
    names = {name: NAMES[name] for name in args.methods if name in NAMES}
    sizes = Sizes(args.limit, args.changed, args.layer, args.stream, args.orders)
    methods = [m for m in args.methods if not args.finished or runs.has(Cell(m, args.limit))]
    every = Choices(methods, names, sizes, other_layers(base, methods)).pairs
    wanted = tuple(args.choices or every)
    pairs = [pair for name, of in every.items() if name.startswith(wanted) for pair in of]
    if args.finished:
        pairs = [p for p in pairs if all(map(runs.has, (*p.first.cells, *p.second.cells)))]
    found = {number: measured(pair, runs.read) for number, pair in enumerate(pairs)}
    for line in table(pairs, found):
        print(line)
    orders = spreads(pairs, runs)
    effects = traced(base, args.facts, 20) if "layer" in {pair.choice for pair in pairs} else {}
    seconds = sum(run["seconds"] for run in runs.known.values())
    print(
        f"\n{json.dumps({'orders': orders, 'traced': effects})}\n{seconds:.0f} s of processor time"
    )
    rows = [
        {"choice": pair.choice, "of": pair.label, "model": Path(args.model).name}
        | {"scoring": pair.scores_alone}
        | {panel: one._asdict() for panel, one in found[number].items()}
        for number, pair in enumerate(pairs)
    ]
    content = {"rows": rows, "orders": orders, "traced": effects, "seconds": seconds}
    result = args.output / f"{Path(args.model).name}.json"
    result.write_text(json.dumps(content, indent=1, ensure_ascii=False))
    if args.draw:
        rows += [row for file in args.beside for row in json.loads(file.read_text())["rows"]]
        draw_moved([row for row in rows if not row["scoring"]], args.draw)
        scored = args.draw.with_stem(f"{args.draw.stem}_scoring")
        draw_moved([row for row in rows if row["scoring"]], scored)


if __name__ == "__main__":
    main()
