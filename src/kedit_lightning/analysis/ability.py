"""General ability before and after edits, document by document: what may be claimed of it.

An edit is *not inferior* on a task if the one-sided 95 % confidence bound of the mean difference,
after less before, lies above minus the margin. Otherwise nothing is claimed, and the number of
documents is named that would be needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml
from lightning.pytorch.utilities.seed import isolate_rng
from rich.table import Table
from scipy.stats import norm

from kedit_lightning.analysis.harness import harness, harness_model
from kedit_lightning.analysis.known_choices import CHOICES_TASK, choice_scores
from kedit_lightning.base_models import BaseModel
from kedit_lightning.errors import DataFileError, DataFileNotFoundError, UnsupportedUseError
from kedit_lightning.metrics.functional import paired_difference
from kedit_lightning.metrics.functional.paired_tests import mcnemar

#: Scores of documents by task and metric, then by the number of the document.
DocumentScores: TypeAlias = dict[tuple[str, str], dict[str, float]]

#: One-sided level of the bound, and the power of the number of documents needed.
LEVEL, POWER = 0.95, 0.8


@dataclass(frozen=True)
class AbilityChange:
    """How a task's scores have changed.

    Args:
        task: The task.
        metric: Its metric, of which more is better.
        documents: Documents that were answered both times.
        before: Mean before the edits.
        after: Mean after them.
        low: One-sided 95 % bound of the difference: no lower than that.
        p: Exact p-value of McNemar's test that both are equal; ``None`` where scores are not all
            0 or 1.
        margin: Loss that would not matter.
        needed: Documents by which no loss beyond the margin would be shown in four runs of five, if
            there is none at all.
    """

    task: str
    metric: str
    documents: int
    before: float
    after: float
    low: float
    p: float | None
    margin: float
    needed: int

    @property
    def not_inferior(self) -> bool:
        """Whether a loss beyond the margin is ruled out."""
        return self.low > -self.margin


def ability_scores(
    base: BaseModel, tasks: Sequence[str], batch_size: int = 16, limit: int | None = None
) -> DocumentScores:
    """Scores of tasks of lm-evaluation-harness under the edits that are applied.

    The questions of ``nano_choices`` come with the package and need no harness.

    Args:
        base: The base model.
        tasks: Names of tasks, and YAML files of your own.
        batch_size: Rows of a forward pass.
        limit: Documents of each task, the first ones; all if not given.

    Raises:
        MissingExtraError: The harness is not installed.
        DataFileError: A YAML file is no task.
        UnsupportedUseError: There is no such task.
    """
    scores: DocumentScores = {}
    if CHOICES_TASK in tasks:
        scores[CHOICES_TASK, "acc"] = choice_scores(base, batch_size, limit)
    if not needs_harness(tasks):
        return scores
    tasks = [task for task in tasks if task != CHOICES_TASK]
    evaluator, files = harness(), [_task(task) for task in tasks]
    named = any(isinstance(task, str) for task in files)
    with isolate_rng():  # it sets all seeds
        manager = evaluator.tasks.TaskManager(include_defaults=named)
        unknown = [t for t in files if isinstance(t, str) and t not in manager.all_tasks]
        if unknown:
            raise UnsupportedUseError(
                f"lm-evaluation-harness has no task {unknown[0]!r}; `lm-eval ls tasks` lists them, "
                "and a YAML file of your own is named by its path"
            )
        found = evaluator.simple_evaluate(
            harness_model(base, batch_size),
            tasks=files,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=manager,
        )
    for task, samples in found["samples"].items():
        better = found["higher_is_better"].get(task, {})
        for sample in samples:
            for metric in sample["metrics"]:
                value = sample[metric]
                if better.get(metric) is True and isinstance(value, bool | int | float):
                    filtered = "" if sample["filter"] == "none" else f" ({sample['filter']})"
                    key = (task, f"{metric}{filtered}")
                    scores.setdefault(key, {})[str(sample["doc_id"])] = float(value)
    return scores


def needs_harness(tasks: Sequence[str]) -> bool:
    """Whether there are tasks that do not come with the package.

    >>> needs_harness(["nano_choices"]), needs_harness(["nano_choices", "arc_easy"])
    (False, True)
    """
    return any(task != CHOICES_TASK for task in tasks)


def changes(
    before: DocumentScores, after: DocumentScores, margin: float, seed: int = 0
) -> list[AbilityChange]:
    """How scores have changed, over the documents that were answered both times.

    Where several tasks have one metric, a last line has all their documents together.
    """
    rows, pooled = [], dict[str, list[tuple[float, float]]]()
    for task, metric in sorted(before.keys() & after.keys()):
        then, now = before[task, metric], after[task, metric]
        pairs = [(then[doc], now[doc]) for doc in then if doc in now]
        rows.append(_change(task, metric, pairs, margin, seed))
        pooled.setdefault(metric, []).extend(pairs)
    for metric, pairs in pooled.items():
        if sum(row.metric == metric for row in rows) > 1:
            rows.append(_change("all tasks", metric, pairs, margin, seed))
    return rows


def _change(
    task: str, metric: str, pairs: Sequence[tuple[float, float]], margin: float, seed: int
) -> AbilityChange:
    first, second = torch.tensor(pairs, dtype=torch.float64).T
    # Both tails of 90 % leave 5 % below.
    difference, low, _ = paired_difference(second, first, level=2 * LEVEL - 1, seed=seed)
    whole = all(bool(((side == 0) | (side == 1)).all()) for side in (first, second))
    return AbilityChange(
        task,
        metric,
        len(pairs),
        first.mean().item(),
        first.mean().item() + difference,
        low,
        mcnemar(second, first) if whole else None,
        margin,
        documents_needed((second - first).std(correction=0).item(), margin),
    )


def documents_needed(sd: float, margin: float) -> int:
    """Documents by which no loss beyond a margin would be shown, if there is none at all.

    ``((z_level + z_power) · sd / margin)²`` with the standard deviation of the differences. Where
    no document differs it is the number at which Wilson's bound of losses falls below the margin,
    ``z² (1 - margin) / margin``.

    >>> documents_needed(0.3, 0.01), documents_needed(0.0, 0.01)
    (5565, 268)
    """
    level, power = float(norm.ppf(LEVEL)), float(norm.ppf(POWER))
    least = level**2 * (1 - margin) / margin
    return math.ceil(max(least, ((level + power) * sd / margin) ** 2))


def ability_table(rows: Sequence[AbilityChange]) -> Table:
    """What may be claimed, for the terminal."""
    margin = rows[0].margin if rows else 0.0
    table = Table(
        title=f"general ability, margin {margin:g}",
        caption="bound: one-sided 95% of after less before, paired by document",
    )
    for name in ("task", "metric", "documents", "before", "after", "bound", "claim"):
        table.add_column(name, justify="left" if name in ("task", "metric", "claim") else "right")
    for row in rows:
        claim = "not inferior" if row.not_inferior else f"cannot claim; needs {row.needed:,}"
        numbers = (f"{value:.3f}" for value in (row.before, row.after, row.low))
        table.add_row(row.task, row.metric, str(row.documents), *numbers, claim)
    return table


def _task(name: str) -> str | dict[str, Any]:
    """The name of a task, or what a YAML file says of one.

    Raises:
        DataFileNotFoundError: There is no such file.
        DataFileError: It is no task, or has tags that run code.
    """
    if not name.endswith((".yaml", ".yml")):
        return name
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataFileNotFoundError(f"there is no task file '{name}'; correct its path")
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataFileError(
            f"task file '{name}' cannot be read: {reason}; tags such as !function, which run code, "
            "are refused"
        ) from error
    if not isinstance(task, dict) or "task" not in task:
        raise DataFileError(
            f"task file '{name}' is no task of lm-evaluation-harness: it has no field 'task'"
        )
    given = task.get("dataset_kwargs") or {}
    if "data_files" in given:
        task["dataset_kwargs"] = {**given, "data_files": _beside(given["data_files"], path.parent)}
    return task


def _beside(files: Any, folder: Path) -> Any:
    """Paths of data files, read from the folder of the task file where they lie there."""
    if isinstance(files, Mapping):
        return {split: _beside(inner, folder) for split, inner in files.items()}
    if isinstance(files, list):
        return [_beside(inner, folder) for inner in files]
    beside = folder / str(files)
    return str(beside.resolve()) if beside.is_file() else files
