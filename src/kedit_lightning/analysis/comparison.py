"""Runs side by side: scores with intervals, and which of them can be told apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.run_context import new_metrics
from kedit_lightning.data.dataloader import chunks
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


#: Draws of a bootstrap, and draws for each pair where these are more.  Holm's correction asks for
#: p-values below 0.05 over the number of pairs; that of a bootstrap is at least 2 over its draws.
_DRAWS, _DRAWS_A_PAIR = 10_000, 200
#: Pairs whose draws are held at a time.
_COLUMNS = 64


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


class _Pair(NamedTuple):
    """Values ``[cases]`` of two runs on the cases that both have, and the clusters of these."""

    first: Run
    second: Run
    a: Tensor
    b: Tensor
    clusters: Tensor

    @property
    def seed(self) -> int:
        return int(self.first.facts["seed"])


def _differences(runs: Sequence[Run], key: str) -> Iterator[Difference]:
    pairs = [
        _Pair(first, second, *_shared(first.cases[key], second.cases[key]))
        for first, second in combinations(runs, 2)
    ]
    p_values = _p_values(pairs)
    for pair, p, adjusted in zip(pairs, p_values, holm(p_values), strict=True):
        numbers = (float("nan"),) * 3
        if len(pair.a):
            numbers = paired_difference(pair.a, pair.b, pair.clusters, seed=pair.seed)
        labels = pair.first.label, pair.second.label
        yield Difference(key, *labels, *numbers, p, adjusted, len(pair.a))


def _p_values(pairs: Sequence[_Pair]) -> list[float]:
    """Of each pair: McNemar's where all values are 0 or 1, else a bootstrap's."""
    found: dict[int, float] = {}
    alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for number, pair in enumerate(pairs):
        if not len(pair.a):
            found[number] = 1.0
        elif all(bool(((side == 0) | (side == 1)).all()) for side in (pair.a, pair.b)):
            found[number] = mcnemar(pair.a, pair.b)
        else:
            alike.setdefault((pair.seed, tuple(pair.clusters.tolist())), []).append(number)
    draws = max(_DRAWS, _DRAWS_A_PAIR * len(pairs))
    for (seed, clusters), numbers in alike.items():
        for some in chunks(numbers, _COLUMNS):
            differences = torch.stack([pairs[n].a - pairs[n].b for n in some], dim=1)
            means = resampled_means(differences, clusters, draws, seed)
            found |= zip(some, map(bootstrap_p, means.unbind(dim=1)), strict=True)
    return [found[number] for number in range(len(pairs))]


def _shared(first: Cases, second: Cases) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the cases that both have, and their clusters. Shapes ``[cases]``."""
    places = {int(id): index for index, id in enumerate(second.ids)}
    pairs = [(i, places[int(id)]) for i, id in enumerate(first.ids) if int(id) in places]
    at = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return first.values[at[:, 0]], second.values[at[:, 1]], first.clusters[at[:, 0]]
