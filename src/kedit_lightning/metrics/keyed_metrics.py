"""Metrics by result key, created as records name them, and equal on all processes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from kedit_lightning.errors import InvalidRequestError, UnsupportedUseError
from kedit_lightning.metrics.example_record import ExampleRecord, ProbeRecord, stage_prefix
from kedit_lightning.metrics.functional.bootstrap import (
    percentile_interval,
    resampled_means,
)
from kedit_lightning.metrics.measurement import RECORDED, Measurement, built_in
from kedit_lightning.metrics.scores.case_mean import CaseMean, Cases, ProbeMean, name_id
from kedit_lightning.requests import ProbeKind

#: Probes of one example by kind and group.
ProbeGroups: TypeAlias = dict[ProbeKind, dict[str, list[ProbeRecord]]]


class SummaryRow(NamedTuple):
    """One line of a report: a mean over ``n`` cases and the bounds of its interval."""

    key: str
    mean: float
    low: float
    high: float
    n: int


class KeyedMetrics(nn.Module):
    """Means over cases by result key; a module, so that states follow the device of its owner.

    Args:
        level: Coverage of the intervals.
        resamples: Draws of the bootstrap.
        seed: Seed of the draws.
        sync: Whether ``compute`` and ``summary`` gather the cases of all processes of a distributed
            run. All of them must then call these together.
    """

    _place: Tensor

    def __init__(
        self, level: float = 0.95, resamples: int = 10_000, seed: int = 0, sync: bool = True
    ) -> None:
        super().__init__()
        self.level = level
        self.resamples = resamples
        self.seed = seed
        self.sync = sync
        self.metrics = nn.ModuleDict()
        #: Stages, and keys of costs, with the ids of the examples that were added.
        self.seen: set[tuple[str, str]] = set()
        #: Cases by key that no metric has yet: it takes many at a time, which costs it no more.
        self._waiting: dict[str, list[tuple[float, int, int]]] = {}
        self._scores = self.scores()
        # Metrics created later go to the device that this has been moved to; nothing else does.
        self.register_buffer("_place", torch.zeros(1), persistent=False)

    @classmethod
    def from_records(cls, records: Iterable[ExampleRecord], **settings: Any) -> Self:
        """Score records that were written earlier, one an example and stage, in this process."""
        metrics = cls(**settings, sync=False)
        for record in records:
            metrics.update(record)
        return metrics

    # ---- what a subclass declares

    @classmethod
    @abstractmethod
    def scores(cls) -> Sequence[type[ProbeMean]]:
        """Scores of probes."""

    @abstractmethod
    def key(
        self, score: type[ProbeMean], stage: str, kind: ProbeKind, group: str | None
    ) -> str | None:
        """Result key of a score over the probes of a kind, ``None`` to leave it out.

        ``stage`` is the prefix of the stage; ``group`` is ``None`` for the mean over groups.
        """

    @classmethod
    def measurements(cls, task: str = "") -> dict[ProbeKind, tuple[Measurement, ...]]:
        """Measurements of a probe of each kind: the union of what its scores declare.

        Those of this package come first, in the order of the records. What is measured of finished
        records is none of them.

        Args:
            task: Task of the probe, whose metrics are among them.

        Raises:
            UnsupportedUseError: Two measurements of one kind of probe have the same name.
        """
        union: dict[ProbeKind, tuple[Measurement, ...]] = {}
        for kind in get_args(ProbeKind):
            by_name = {measurement.name: measurement for measurement in RECORDED}
            for score in cls.scores():
                scores_it = kind in score.kinds and (not score.tasks or task in score.tasks)
                for new in score.measurements if scores_it else ():
                    if new.source == "record":
                        continue
                    if by_name.setdefault(new.name, new) != new:
                        raise UnsupportedUseError(
                            f"measurement {new.name!r} of metric {score.__name__} differs from "
                            "another measurement of this name; give it another name"
                        )
            order = dict.fromkeys([*built_in(kind), *sorted(by_name)])
            union[kind] = tuple(by_name[name] for name in order if name in by_name)
        return union

    # ---- cases

    def update(self, record: ExampleRecord) -> None:
        """Add one scored example, a line of ``results.jsonl``.

        Raises:
            InvalidRequestError: The stage is unknown, or the example was scored at it before.
        """
        stage = stage_prefix(record)
        if (record["stage"], record["id"]) in self.seen:
            raise InvalidRequestError(
                f"example {record['id']!r} was scored at stage {record['stage']!r} before; "
                "give every example an id of its own, and reset the metrics between runs"
            )
        self.seen.add((record["stage"], record["id"]))
        for kind, groups in self.groups(record).items():
            for score in self._scores:
                if kind not in score.kinds:
                    continue
                means = {
                    group: score.case_value(score.scored(probes))
                    for group, probes in groups.items()
                }
                values = {group: value for group, value in means.items() if value is not None}
                if not values:
                    continue
                overall = sum(values.values()) / len(values)
                for group, value in [(None, overall), *values.items()]:
                    if (key := self.key(score, stage, kind, group)) is not None:
                        self.add(record, key, score, value)

    def groups(self, record: ExampleRecord) -> ProbeGroups:
        """Probes of a record by kind and group, in the order of their first appearance.

        A condition stands with the probes of the group that it is a condition of.
        """
        kinds: ProbeGroups = {}
        conditions: list[ProbeRecord] = []
        for probe in record["probes"]:
            if probe.get("task", {}).get("condition"):
                conditions.append(probe)
            else:
                kinds.setdefault(probe["kind"], {}).setdefault(probe["group"], []).append(probe)
        for probe in conditions:
            for groups in kinds.values():
                if probe["group"] in groups:
                    groups[probe["group"]].append(probe)
        return kinds

    def add(self, record: ExampleRecord, key: str, score: type[CaseMean], value: float) -> None:
        """Add the value of one case to the metric of a key; its subject is its cluster."""
        case, subject = name_id(record["id"]), record.get("subject")
        cluster = case if subject is None else name_id(subject)
        self._created(key, score)
        self._waiting.setdefault(key, []).append((value, cluster, case))

    def metric(self, key: str, score: type[CaseMean]) -> CaseMean:
        """The metric of a key, created at its first use.

        Raises:
            UnsupportedUseError: A metric of another class has the key.
        """
        metric = self._created(key, score)
        if waiting := self._waiting.pop(key, None):
            metric.update(*zip(*waiting, strict=True))
        return metric

    def _created(self, key: str, score: type[CaseMean]) -> CaseMean:
        name = key.replace(".", "%2E")  # torch refuses dots in names of modules
        if name not in self.metrics:
            metric = score(self.level, self.resamples, self.seed, sync_on_compute=self.sync)
            self.metrics[name] = metric.to(self._place.device)
        known = cast(CaseMean, self.metrics[name])
        if type(known) is not score:
            raise UnsupportedUseError(
                f"metrics {type(known).__name__} and {score.__name__} both have the result key "
                f"{key!r}; give one of them another name"
            )
        return known

    def by_key(self) -> dict[str, CaseMean]:
        """All metrics by key, sorted."""
        metrics = {name.replace("%2E", "."): metric for name, metric in self.metrics.items()}
        known = {key: cast(CaseMean, metrics[key]) for key in sorted(metrics)}
        return {key: self.metric(key, type(metric)) for key, metric in known.items()}

    # ---- results

    def _agree_on_keys(self) -> None:
        """Create the metrics that only other processes have, so that all gather the same ones."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.sync and distributed):
            return
        local = {key: type(metric) for key, metric in self.by_key().items()}
        everyone: list[dict[str, type[CaseMean]]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, local)
        for key, score in (item for remote in everyone for item in remote.items()):
            self.metric(key, score)

    def gathered(self) -> dict[str, tuple[CaseMean, Cases]]:
        """Each metric with its cases from all processes, by key; those without cases left out."""
        self._agree_on_keys()
        # Every metric is gathered before any is left out: all processes take part in each.
        gathered = {key: (metric, metric.cases()) for key, metric in self.by_key().items()}
        return {key: entry for key, entry in gathered.items() if len(entry[1].values)}

    def compute(self) -> dict[str, float]:
        """Mean over cases by key, with the extras of a metric (``<key>/median``) after it."""
        numbers: dict[str, float] = {}
        for key, (metric, cases) in self.gathered().items():
            numbers[key] = cases.values.mean().item()
            extras = metric.extras(cases.values)
            numbers.update({f"{key}/{name}": value for name, value in extras.items()})
        return numbers

    def summary(self) -> list[SummaryRow]:
        """Mean, bounds of the metric's own ``interval`` and number of cases, by key.

        Keys over the same cases share the draws of the bootstrap.
        """
        gathered = self.gathered()
        bounds: dict[str, tuple[float, float]] = {}
        together: dict[tuple[int, ...], list[str]] = {}
        for key, (metric, cases) in gathered.items():
            if agreed := metric.agreed_interval(cases):
                bounds[key] = agreed
            else:
                together.setdefault(tuple(cases.clusters.tolist()), []).append(key)
        for keys in together.values():
            values = torch.stack([gathered[key][1].values for key in keys], dim=1)
            clusters = gathered[keys[0]][1].clusters
            means = resampled_means(values, clusters, self.resamples, self.seed)
            for column, key in enumerate(keys):
                bounds[key] = percentile_interval(means[:, column], self.level)
        return [
            SummaryRow(key, cases.values.mean().item(), *bounds[key], len(cases.values))
            for key, (_, cases) in gathered.items()
        ]

    def reset(self) -> None:
        """Forget all cases and keys."""
        self.metrics.clear()
        self._waiting.clear()
        self.seen.clear()
