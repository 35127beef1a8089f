"""Runs side by side: scores with intervals, and which of them can be told apart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.run_context import new_metrics
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.metrics import SummaryRow
from kedit_lightning.metrics.functional.bootstrap import paired_difference, resampled_means
from kedit_lightning.metrics.functional.paired_tests import bootstrap_p, holm, mcnemar
from kedit_lightning.metrics.retention import Spread
from kedit_lightning.metrics.scores.case_mean import Cases
from kedit_lightning.runs.record_lines import records_in
from kedit_lightning.runs.results import read_results
from kedit_lightning.runs.stream_orders import read_spreads

#: Facts of a run that must be equal for its numbers to stand beside another's.
_COMPARED = (
    "base_model.fingerprint",
    "dataset.sha256",
    "dataset.records",
    "protocol.id",
    "metric_protocol.scoring",
    "metric_protocol.free_answers",
    "metric_protocol.locality",
)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        label: How tables name it.
        facts: What ``results.json`` says.
        scores: Its scores with their intervals, by key.
        cases: The cases of each score.
        drift: What ``drift.json`` says of a stream, if it was followed.
        spread: How scores spread over the orders of a stream, if it had several.
    """

    label: str
    facts: Mapping[str, Any]
    scores: Mapping[str, SummaryRow]
    cases: Mapping[str, Cases]
    drift: Mapping[str, Any] = field(default_factory=dict)
    spread: Mapping[str, Spread] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """How two runs differ on the cases that both have.

    ``p`` is of McNemar's test where all values are 0 or 1, else of the bootstrap; ``adjusted`` is
    Holm's over all pairs of the same score.
    """

    score: str
    first: str
    second: str
    mean: float
    low: float
    high: float
    p: float
    adjusted: float
    cases: int

    @property
    def told_apart(self) -> bool:
        """Whether the two differ at the 5 % level after adjustment."""
        return self.adjusted < 0.05


@dataclass(frozen=True)
class Comparison:
    """Scores of several runs, by score and label, and the difference of each pair.

    ``spread`` has the scores of runs with several orders over these.
    """

    labels: tuple[str, ...]
    scores: dict[str, dict[str, SummaryRow]]
    differences: tuple[Difference, ...]
    spread: dict[str, dict[str, Spread]] = field(default_factory=dict)


def read_run(path: Path) -> Run:
    """Read the folder of a finished run.

    Raises:
        DataFileNotFoundError: It holds no results.
        DataFileError: A newer release wrote them.
    """
    facts = read_results(path)
    protocol = facts["protocol"]
    rules = {name: protocol[name] for name in ("scoring", "answers") if name in protocol}
    kind = type(new_metrics(Protocol(**rules)))
    metrics = kind.from_records(records_in(path), seed=facts["seed"])
    cases = {key: found for key, (_, found) in metrics.gathered().items()}
    scores = {row.key: row for row in metrics.summary()}
    drift = _read_json(path / "drift.json")
    return Run(path.name, facts, scores, cases, drift, read_spreads(path))


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def named(runs: Sequence[Run]) -> list[Run]:
    """The runs under names that tell them apart: the method's where that is enough."""
    methods = [run.facts["method"]["name"] for run in runs]
    labels = methods if len(set(methods)) == len(runs) else [run.label for run in runs]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({n})" for n, label in enumerate(labels, start=1)]
    return [replace(run, label=label) for label, run in zip(labels, runs, strict=True)]


def refuse_different(runs: Sequence[Run]) -> None:
    """Refuse runs whose numbers mean different things.

    Raises:
        UnsupportedUseError: They differ in protocol, dataset or base model.
    """
    for path in _COMPARED:
        values = [_at(run.facts, path) for run in runs]
        if len({json.dumps(value, sort_keys=True) for value in values}) == 1:
            continue
        told = "; ".join(f"{run.label}: {value}" for run, value in zip(runs, values, strict=True))
        if path == "protocol.id":
            told += f"; they differ in {_differing([run.facts['protocol'] for run in runs])}"
        raise UnsupportedUseError(
            f"the runs cannot be compared: {path} is not the same ({told}); their numbers answer "
            "different questions, so run them again under one protocol, dataset and base model"
        )


def _at(facts: Mapping[str, Any], path: str) -> Any:
    value: Any = facts
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _differing(protocols: Sequence[Mapping[str, Any]]) -> str:
    names = sorted(set().union(*protocols) - {"id"})
    texts = {
        name: [json.dumps(protocol.get(name), sort_keys=True) for protocol in protocols]
        for name in names
    }
    return ", ".join(
        f"{name} ({' against '.join(values)})"
        for name, values in texts.items()
        if len(set(values)) > 1
    )


def compared(runs: Sequence[Run], groups: bool = False, only: Sequence[str] = ()) -> Comparison:
    """Put runs side by side.

    Args:
        runs: At least two, of one protocol, dataset and base model.
        groups: Also scores of single groups of probes.
        only: Names of the scores that are compared, in this order; all if none is given.

    Raises:
        UnsupportedUseError: There are too few runs, they cannot be compared, or a run lacks a
            score.
    """
    if len(runs) < 2:
        raise UnsupportedUseError(
            f"a comparison needs at least two runs, got {len(runs)}; name their output folders"
        )
    refuse_different(runs)
    runs = named(runs)
    keys = [key for key in runs[0].scores if all(key in run.scores for run in runs)]
    if missing := [name for name in only if name not in keys]:
        raise UnsupportedUseError(
            f"not all runs have {', '.join(missing)}; all of them have {', '.join(keys)}"
        )
    keys = [*only] or [key for key in keys if _is_score(key) and (groups or not _is_group(key))]
    scores = {key: {run.label: run.scores[key] for run in runs} for key in keys}
    differences = [difference for key in keys for difference in _differences(runs, key)]
    spread = {
        key: {run.label: run.spread[key] for run in runs if key in run.spread} for key in keys
    }
    return Comparison(tuple(run.label for run in runs), scores, tuple(differences), spread)


def _is_score(key: str) -> bool:
    return not key.startswith(("timing/", "memory/", "edit/"))


def _is_group(key: str) -> bool:
    """Whether it is of a single group of probes, or of a checkpoint, which curves show."""
    return key.removeprefix("final/").removeprefix("forget/").count("/") > 1


def _differences(runs: Sequence[Run], key: str) -> Iterable[Difference]:
    found = [_difference(first, second, key) for first, second in combinations(runs, 2)]
    adjusted = holm([one.p for one in found])
    return [replace(one, adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def _difference(first: Run, second: Run, key: str) -> Difference:
    a, b, clusters = _shared(first.cases[key], second.cases[key])
    if not len(a):
        return Difference(
            key, first.label, second.label, *(float("nan"),) * 3, p=1.0, adjusted=1.0, cases=0
        )
    seed = int(first.facts["seed"])
    mean, low, high = paired_difference(a, b, clusters, seed=seed)
    if all(bool(((side == 0) | (side == 1)).all()) for side in (a, b)):
        p = mcnemar(a, b)
    else:
        p = bootstrap_p(resampled_means((a - b)[:, None], clusters, seed=seed)[:, 0])
    return Difference(key, first.label, second.label, mean, low, high, p, p, len(a))


def _shared(first: Cases, second: Cases) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the cases that both have, and their clusters. Shapes ``[cases]``."""
    places = {int(id): index for index, id in enumerate(second.ids)}
    pairs = [(i, places[int(id)]) for i, id in enumerate(first.ids) if int(id) in places]
    at = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return first.values[at[:, 0]], second.values[at[:, 1]], first.clusters[at[:, 0]]
