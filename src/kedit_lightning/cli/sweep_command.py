"""``kedit sweep``: settings of a method chosen by their score, with Optuna."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.table import Table

from kedit_lightning.edits.edit_file import write_atomically
from kedit_lightning.errors import MissingExtraError, SweepError, article_list
from kedit_lightning.runs.results import tell

USAGE = "kedit sweep FILE [-c CONFIG] [--trials N] [--output DIR] [options of kedit test]"
HELP = f"""\
usage: {USAGE}

Try settings of a method, and keep the best: each trial is one run of `kedit test` in this process.
The same command in another terminal is another worker on the same storage; given again after an
end, it goes on. A trial whose worker was killed is run again.

FILE is YAML:
  config: [methods/ftm, data/nano_facts]    configs of every trial; -c adds more
  objective: score            a score as in results.json, such as final/rewrite/gen_em, or `score`,
                              the harmonic mean of rewrite, rephrase and locality
  space:                      settings as on the command line, without --
    model.lr: {{low: 1e-4, high: 1e-1, log: true}}
    model.steps: {{low: 5, high: 50, step: 5}}       whole numbers, as low and high are
    model.layers: [[0], [1], [0, 1]]                choices
  and, where the value shown is not wanted, each also as an option (--trials 40):
    direction                 maximize or minimize; what the metric says
    split: validation         the split that trials edit and score; test to see the test split
    trials: 20                settings to try, over all workers
    seed: 0                   seed of the sampler
    sampler: tpe              or random
    pruner: median            or halving (successive halving), or none: ends poor trials early
    every: 10                 scored records between two reports to the pruner
    startup: 5                trials before sampler and pruner learn from others
    study: (name of FILE)     several studies may share a storage
    output: sweeps/STUDY      folder of trials, table, figure and best.yaml
    storage: sqlite:///OUTPUT/sweep.db   or postgresql://user:password@host/database
    heartbeat: 20             a trial silent for three times as many seconds is run again,
    retries: 2                so often

All other options go to `kedit test`, for every trial. At the end OUTPUT has trials.csv, sweep.png
and best.yaml, which `kedit test -c best.yaml --output run/` takes.

example:
  kedit sweep ftm.yaml -c methods/ftm -c data/nano_facts --data.limit 20 --trials 20
"""


def run_sweep(arguments: Sequence[str]) -> str:
    """Work on a sweep until its budget is used up, and give its table.

    Raises:
        UsageError: The arguments do not fit.
        MissingExtraError: Optuna is not installed.
        SweepError: The sweep cannot be begun or continued, or no trial has a score.
    """
    if {"-h", "--help"} & set(arguments):
        return HELP
    if find_spec("optuna") is None:
        raise MissingExtraError("sweeps need Optuna: pip install 'kedit-lightning[sweep]'")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    plans = import_module("kedit_lightning.cli.sweep_plan")
    trials = import_module("kedit_lightning.cli.sweep_trial")
    studies = import_module("kedit_lightning.analysis.sweep_study")
    plan = plans.read_plan(arguments, USAGE)
    runner = trials.TrialRunner(plan)
    asked = {**plan.asked(), **runner.check()}
    plan.output.mkdir(parents=True, exist_ok=True)
    study = studies.SweepStudy(plan.storage, plan.study, plan.direction, plan.budget)
    study.check_asked(asked)
    before = study.outcomes()
    if not before and any((plan.output / "trials").glob("[0-9]*")):
        raise SweepError(
            f"{plan.output} holds trials, and study '{plan.study}' has run none; name another "
            "folder with --output, or remove them"
        )
    if before:
        tell(f"study '{plan.study}' has {_trials(len(before))} already")
    try:
        study.work(
            plan.space, runner.measure, lambda one: tell(_line(one, study.outcomes())), _wait
        )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command goes on; its trial is run again\n")
        raise SystemExit(130) from None
    return _report(plan, study.outcomes())


def _wait(others: int) -> None:
    tell(f"other workers still run {_trials(others)}; this one waits, to run them if they end")


def _line(one: Any, outcomes: Sequence[Any]) -> str:
    """What became of a trial, in one line."""
    finished = sum(other.state not in ("running", "waiting") for other in outcomes)
    score = "" if one.value is None else f" {one.value:.4g}"
    settings = ", ".join(f"{name} {_short(value)}" for name, value in one.params.items())
    error = f": {one.error}" if one.error else ""
    return f"trial {one.number} {one.state}{score} ({settings}){error} [{finished} finished]"


def _report(plan: Any, outcomes: Sequence[Any]) -> str:
    """The table; beside it, files in the output folder."""
    found = import_module("kedit_lightning.analysis.sweep_outcome")
    figures = import_module("kedit_lightning.analysis.figures.sweep_figure")
    best = found.best_of(outcomes, plan.direction)
    sink = io.StringIO()
    columns = [plan.objective, *plan.space]
    width = 40 + sum(max(len(name), 14) + 3 for name in columns)
    console = Console(file=sink, width=width, highlight=False, markup=False, soft_wrap=True)
    console.print(sweep_table(outcomes, list(plan.space), plan.objective, plan.direction))
    failed = [one for one in outcomes if one.error]
    for text in dict.fromkeys(one.error for one in failed):
        numbers = [str(one.number) for one in failed if one.error == text]
        console.print(f"trial{'s' * (len(numbers) > 1)} {article_list(numbers)} failed: {text}")
    table = _csv(outcomes, list(plan.space))
    write_atomically(plan.output / "trials.csv", table.encode("utf-8"))
    figures.draw_sweep(
        outcomes, plan.space, plan.objective, plan.direction, plan.output / "sweep.png"
    )
    if best is None:
        sys.stdout.write(sink.getvalue())
        raise SweepError(
            f"none of {_trials(len(outcomes))} has a score, so there is no best.yaml; trials.csv "
            f"in {plan.output} says why each failed"
        )
    settings = ", ".join(f"{name}: {_short(value)}" for name, value in best.params.items())
    head = f"# Best of {_trials(len(outcomes))} of study {plan.study} on the {plan.split} split: "
    head += f"{plan.objective} {best.value:.6g}\n# {settings}\n"
    head += f"# kedit test -c {plan.output / 'best.yaml'} --output run/\n"
    write_atomically(plan.output / "best.yaml", (head + best.config).encode("utf-8"))
    console.print(f"trial {best.number} is the best: {plan.objective} {best.value:.4g}, {settings}")
    console.print(f"best.yaml, trials.csv and sweep.png are in {plan.output}")
    return sink.getvalue()


def sweep_table(
    outcomes: Sequence[Any], names: Sequence[str], objective: str, direction: str
) -> Table:
    """Trials from the best to the worst, for the terminal."""
    table = Table(title=f"{objective}, to {direction}")
    for name in ("trial", "state", objective, *names, "seconds"):
        table.add_column(name, justify="left" if name == "state" else "right", overflow="fold")
    sign = -1 if direction == "maximize" else 1

    def rank(one: Any) -> tuple[bool, bool, float]:
        unscored = one.value is None
        return unscored, one.state != "complete", 0.0 if unscored else sign * one.value

    for one in sorted(outcomes, key=rank):
        value = "" if one.value is None else f"{one.value:.4g}"
        shown = [_short(one.params[name]) if name in one.params else "" for name in names]
        seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
        table.add_row(str(one.number), one.state, value, *shown, seconds)
    return table


def _csv(outcomes: Sequence[Any], names: Sequence[str]) -> str:
    sink = io.StringIO()
    rows = csv.writer(sink)
    rows.writerow(["trial", "folder", "state", "value", *names, "seconds", "error"])
    for one in outcomes:
        params: Mapping[str, Any] = one.params
        chosen = [params.get(name, "") for name in names]
        folder = f"trials/{one.run:04d}"
        rows.writerow([one.number, folder, one.state, one.value, *chosen, one.seconds, one.error])
    return sink.getvalue()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _trials(count: int) -> str:
    return f"{count} trial{'s' * (count != 1)}"
