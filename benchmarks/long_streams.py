r"""What seven methods keep of 2,000 facts that are written one after another, and of all else.

    python benchmarks/long_streams.py --output streams/                       on facts-30m
    python benchmarks/long_streams.py --output streams/ --device cuda --jobs 7
    python benchmarks/long_streams.py --output streams/ --methods MEMIT GRACE
    python benchmarks/long_streams.py --output streams/ --figure docs/retention_2000.png
    python benchmarks/long_streams.py --output try/ --base-model nano --facts 40 --trials 1

Each method runs in a process of its own and leaves ``METHOD.json``; one that is there is not made
again.  Settings are chosen first: every method has the same number of trials (``--trials``), each a
stream of validation facts, and the best harmonic mean of rewrites, rephrases and what was known
about neighbours at its end is taken.  Then the facts of the test split are written, and all so far
are asked again after 1, 2, 5, 10, 20, 50, ... of them, with the perplexity of plain text that the
model has not read.  MEMIT, AlphaEdit, UltraEdit, RLEdit and LocFTBF write 100 facts at a time, as
their papers do or nearly; earlier checkpoints than 100 do not exist for them.  GRACE trains the
values of 100 facts in shared passes, which gives the entries that one after another gives, unless
two facts share one.  WISE trains 20 facts as one shard.  RLEdit is fitted before, on the training
split.  With few facts a chunk is a quarter of them at most.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import harmonic_mean
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from kedit_lightning import BaseModel, EditTrainer, methods
from kedit_lightning.analysis.comparison import Run, read_run
from kedit_lightning.analysis.figures.retention_figure import draw_retention
from kedit_lightning.benchmark import Protocol
from kedit_lightning.cache_folder import facts_30m_dir
from kedit_lightning.callbacks import StreamDrift
from kedit_lightning.data import Facts30M, NanoFacts
from kedit_lightning.methods.method import EditMethod
from kedit_lightning.metrics import SummaryRow

Settings = dict[str, Any]
#: What counts at the end of a stream of validation facts.
PARTS = ("rewrite/tf_all", "rephrase/tf_all", "locality/neighborhood/known")
PACKAGES = ("torch", "transformers", "lightning", "kedit-lightning")


class Plan(NamedTuple):
    """How a method runs.

    Args:
        chunk: Facts of one edit.
        fixed: Settings of all trials.
        grid: Values of the settings that are chosen; the first ones are tried first.
        fit: Options of the trainer, where the method is fitted.
    """

    chunk: int
    grid: dict[str, list[Any]]
    fixed: Mapping[str, Any] = MappingProxyType({})
    fit: Mapping[str, Any] | None = None


#: A fit whose keys the edits of a stream leave where they are, as tools/nano/fit_rledit.yaml says.
_RLEDIT: Settings = {
    "projections": "down",
    "shift_size": "keys",
    "rank": 128,
    "blocks": 2,
    "shared": False,
    "lr": 1e-4,
    "lr_lr": 1e-2,
    "lr_end": 0.1,
    "c_loc": 1.0,
    "c_reg": 0.0,
    "n_edits": 20,
    "trajectory": 40,
    "back_depth": 3,
    "steps_per_trajectory": 40,
    "own_wording": True,
    "vary_targets": True,
    "n_locality": 4,
}
PLANS = {
    "MEMIT": Plan(100, {"preserve": [50, 500, 5000], "layers": [[1, 2, 3], [2, 3, 4]]}),
    "AlphaEdit": Plan(100, {"size_cost": [0.1, 1.0], "energy": [0.2, 0.05, 0.5]}),
    "UltraEdit": Plan(100, {"lr": [1e-3, 3e-4, 3e-3, 1e-4, 1e-2, 1e-5]}),
    "GRACE": Plan(100, {"radius": [1.0, 3.0, 10.0, 30.0, 0.3, 100.0]}),
    "WISE": Plan(
        20,
        {"activation_ratio": [0.95, 0.88], "lr": [0.05, 0.2, 1.0]},
        {"steps": 100, "decay": True, "mask_ratio": 1.0, "shard_size": 20, "shards_per_memory": 1,
         "irrelevant": 16, "beta": 80.0, "gamma": 40.0, "contexts": 0},
    ),
    "LocFTBF": Plan(100, {"replay": [100, 400], "lr": [5e-4, 1e-3, 2e-4]}, {"batch_size": 64}),
    "RLEdit": Plan(100, {"edit_lr": [7e-3, 2e-2, 2e-3], "ridge": [100.0, 30.0]}, _RLEDIT,
                   {"max_epochs": 3, "limit_val_batches": 0}),
}  # fmt: skip


class Job(NamedTuple):
    """What is asked of the process of one method."""

    method: str
    base_model: str
    device: str
    facts: int
    choose: int
    trials: int
    epochs: int | None
    fit_facts: int | None = None

    def data(self, limit: int | None, split: str = "test") -> NanoFacts:
        """Facts of a split as those to test, in the order that seed 0 draws."""
        kind = Facts30M if self.base_model == "facts-30m" else NanoFacts
        path = None if split == "test" else kind().split_path("validation")
        return kind(path=path, limit=limit, seed=0)

    @property
    def chunk(self) -> int:
        """Facts of one edit."""
        return min(PLANS[self.method].chunk, max(1, self.facts // 4))

    def trainer(self, protocol: Protocol, **options: Any) -> EditTrainer:
        """A quiet trainer on the device."""
        accelerator = "gpu" if self.device == "cuda" else "cpu"
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        return EditTrainer(protocol=protocol, accelerator=accelerator, **quiet, **options)

    def ready(self, base: BaseModel, settings: Settings, folder: Path) -> EditMethod:
        """The method with its settings, fitted where it learns."""
        plan = PLANS[self.method]
        own = {"layers": [len(base.layout) - 1]} if self.method == "RLEdit" else {}
        kind = getattr(methods, self.method)
        method: EditMethod = kind(base_model=base, **plan.fixed, **own, **settings)
        if plan.fit is not None:
            options = {**plan.fit, **({"max_epochs": self.epochs} if self.epochs else {})}
            trainer = self.trainer(Protocol(), default_root_dir=folder, **options)
            trainer.fit(method, self.data(self.fit_facts))
        return method


def candidates(plan: Plan, trials: int) -> list[Settings]:
    """Settings that are tried: all of the grid, or the first so many of it."""
    grid = [dict(zip(plan.grid, values, strict=True)) for values in product(*plan.grid.values())]
    return grid[:trials]


def ends(method: EditMethod) -> dict[str, float]:
    """What counts at the end of a stream."""
    rows = {row.key: row.mean for row in method.summary}
    return {key: rows[f"final/{key}"] for key in PARTS if f"final/{key}" in rows}


def choose(job: Job, base: BaseModel, folder: Path) -> tuple[EditMethod, list[Settings]]:
    """The method with the best settings on validation facts, and what was tried, best first."""
    plan, tried = PLANS[job.method], []
    for number, settings in enumerate(candidates(plan, job.trials)):
        method = job.ready(base, settings, folder / str(number))
        protocol = Protocol("sequential", job.chunk, evaluate="final", generate=False)
        try:
            job.trainer(protocol).test(method, job.data(job.choose, "validation"), verbose=False)
            scores = ends(method)
        except ArithmeticError as error:  # an edit with values that are not finite is refused
            scores = dict.fromkeys(PARTS, 0.0)
            print(f"{job.method} {settings}: {error}", flush=True)
        composite = harmonic_mean(list(scores.values()))
        print(f"{job.method} {settings}: {composite:.3f} {scores}", flush=True)
        tried.append((composite, number, settings, scores, method))
    tried.sort(key=lambda entry: (-entry[0], entry[1]))
    trials = [{"settings": s, "composite": c, **scores} for c, _, s, scores, _ in tried]
    return tried[0][-1], trials


def measure(job: Job) -> dict[str, Any]:
    """Choose settings, write the stream, and tell what is left of it."""
    warnings.simplefilter("ignore")
    base = BaseModel.load(job.base_model)
    plan, begin = PLANS[job.method], time.perf_counter()
    text = facts_30m_dir() / "text_held_out.txt"
    drift = StreamDrift(text if job.base_model == "facts-30m" else None)
    with tempfile.TemporaryDirectory() as folder:
        method, trials = choose(job, base, Path(folder))
        chosen = time.perf_counter()
        protocol = Protocol("sequential", job.chunk, evaluate="final", every="log", generate=False)
        output = Path(folder) / "run"
        job.trainer(protocol, callbacks=[drift]).test(
            method, job.data(job.facts), verbose=False, output=output
        )
        run = read_run(output)
        return {
            "method": job.method,
            "base_model": run.facts["base_model"],
            "chunk": job.chunk,
            "facts": job.facts,
            "device": torch.cuda.get_device_name() if job.device == "cuda" else "cpu",
            "settings": {**plan.fixed, **trials[0]["settings"]},
            "trials": trials,
            "seconds": {"choice": chosen - begin, "stream": time.perf_counter() - chosen},
            "scores": [row._asdict() for row in run.scores.values()],
            "retention": run.facts["retention"],
            "drift": dict(run.drift),
            "versions": {name: version(name) for name in PACKAGES},
        }


def as_run(found: Mapping[str, Any]) -> Run:
    """A result as the figure takes it."""
    scores = {row["key"]: SummaryRow(**row) for row in found["scores"]}
    return Run(found["method"], {"retention": found["retention"]}, scores, {}, found["drift"])


def table(found: Sequence[Mapping[str, Any]], keys: Sequence[str] = PARTS) -> Iterator[str]:
    """Lines of a table: scores of all facts so far at each checkpoint, and the perplexity."""
    yield "| method | facts | " + " | ".join((*keys, "perplexity")) + " |"
    yield "|---" * (len(keys) + 3) + "|"
    for result in found:
        rows = {row["key"]: row for row in result["scores"]}
        perplexities = {e["facts"]: e["perplexity"] for e in result["drift"]["checkpoints"]}
        for at in result["retention"]["checkpoints"]:
            stage = "final" if at == result["facts"] else f"after_{at}"
            cells = []
            for key in keys:
                row = rows.get(f"{stage}/{key}")
                cells.append(
                    f"{row['mean']:.2f} ({row['low']:.2f}–{row['high']:.2f})" if row else "–"
                )
            cells.append(f"{perplexities[at]:.0f}" if at in perplexities else "–")
            yield f"| {result['method']} | {at} | " + " | ".join(cells) + " |"


def start(options: argparse.Namespace, name: str) -> int:
    """Run one method in a process of its own; its exit status."""
    own = ["--base-model", options.base_model, "--device", options.device, "--child", name]
    counts = {"facts": options.facts, "choose": options.choose, "trials": options.trials}
    own += [str(word) for key, value in counts.items() for word in (f"--{key}", value)]
    own += ["--epochs", str(options.epochs)] if options.epochs else []
    own += ["--fit-facts", str(options.fit_facts)] if options.fit_facts else []
    command = [sys.executable, str(Path(__file__).resolve()), "--output", str(options.output), *own]
    with (options.output / f"{name}.log").open("w", encoding="utf-8") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode


def main() -> None:
    """Run what is missing, then print the table and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of METHOD.json and logs")
    parser.add_argument("--methods", nargs="+", default=list(PLANS), choices=PLANS)
    parser.add_argument("--base-model", default="facts-30m", choices=["facts-30m", "nano"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="methods that run beside each other")
    parser.add_argument("--facts", type=int, default=2000)
    parser.add_argument("--choose", type=int, default=200, help="validation facts of a trial")
    parser.add_argument("--trials", type=int, default=6, help="settings tried for each method")
    parser.add_argument("--epochs", type=int, help="of a fit, in place of the plan's")
    parser.add_argument("--fit-facts", type=int, help="records of a fit; all if absent")
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    parser.add_argument("--child", choices=PLANS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.child:
        job = Job(options.child, options.base_model, options.device, options.facts,
                  options.choose, options.trials, options.epochs, options.fit_facts)  # fmt: skip
        result = json.dumps(measure(job))
        (options.output / f"{options.child}.json").write_text(result, encoding="utf-8")
        return
    places = {name: options.output / f"{name}.json" for name in options.methods}
    missing = [name for name, path in places.items() if not path.is_file()]
    with ThreadPoolExecutor(options.jobs) as pool:
        statuses = list(pool.map(lambda name: start(options, name), missing))
    for name, status in zip(missing, statuses, strict=True):
        if status:
            print(f"{name} failed, see {options.output / name}.log")
    found = [json.loads(p.read_text(encoding="utf-8")) for p in places.values() if p.is_file()]
    print("\n".join(table(found)))
    if options.figure and found:
        print(draw_retention([as_run(result) for result in found], options.figure))


if __name__ == "__main__":
    main()
