"""Metrics by key, made as records name them, and equal on all processes when read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from kedit_lightning.metrics.example_record import ExampleRecord
from kedit_lightning.metrics.functional.bootstrap import (
    needs_wilson,
    percentile_interval,
    resampled_means,
    wilson_interval,
)
from kedit_lightning.metrics.scores.case_mean import CaseMean, Cases


class SummaryRow(NamedTuple):
    """One line of a report: a mean over ``n`` cases and the bounds of its interval."""

    key: str
    mean: float
    low: float
    high: float
    n: int


class KeyedMetrics(nn.Module):
    """Case metrics by key; a module, so that states follow the device of whatever owns it.

    Args:
        level: Coverage of the intervals.
        resamples: Draws of the bootstrap.
        seed: Seed of the draws.
        sync: Whether reading gathers the cases of all processes of a distributed run. All of them
            must then read together.
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
        # Metrics made later go where this has been moved; nothing else does.
        self.register_buffer("_place", torch.zeros(1), persistent=False)

    @classmethod
    def from_records(
        cls,
        records: Iterable[ExampleRecord],
        level: float = 0.95,
        resamples: int = 10_000,
        seed: int = 0,
    ) -> Self:
        """Score records that were written earlier, in this process alone.

        Args:
            records: One record an example and stage.
            level: Coverage of the intervals.
            resamples: Draws of the bootstrap.
            seed: Seed of the draws.
        """
        metrics = cls(level, resamples, seed, sync=False)
        for record in records:
            metrics.update(record)
        return metrics

    @abstractmethod
    def update(self, record: ExampleRecord) -> None:
        """Add one scored example, as a line of ``results.jsonl`` holds it."""

    def metric(self, key: str, kind: type[CaseMean]) -> CaseMean:
        """The metric of a key, made when it is first asked for.

        Args:
            key: Key of the score.
            kind: Class of the metric.
        """
        name = key.replace(".", "%2E")  # torch refuses dots in names of modules
        if name not in self.metrics:
            made = kind(self.level, self.resamples, self.seed, sync_on_compute=self.sync)
            self.metrics[name] = made.to(self._place.device)
        found = self.metrics[name]
        assert isinstance(found, CaseMean)
        return found

    def by_key(self) -> dict[str, CaseMean]:
        """All metrics by key, sorted."""
        found = {
            name.replace("%2E", "."): metric
            for name, metric in self.metrics.items()
            if isinstance(metric, CaseMean)
        }
        return dict(sorted(found.items()))

    def agree_on_keys(self) -> None:
        """Make the metrics that only other processes have met, so that all gather the same ones."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.sync and distributed):
            return
        mine = {key: type(metric) for key, metric in self.by_key().items()}
        everyone: list[dict[str, type[CaseMean]]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        for theirs in everyone:
            for key, kind in theirs.items():
                self.metric(key, kind)

    def gathered(self) -> dict[str, tuple[CaseMean, Cases]]:
        """Each metric with its cases from all processes, by key; those without cases left out."""
        self.agree_on_keys()
        # Every metric is gathered before any is left out: all processes take part in each.
        found = {key: (metric, metric.cases()) for key, metric in self.by_key().items()}
        return {key: entry for key, entry in found.items() if len(entry[1].values)}

    def compute(self) -> dict[str, float]:
        """Mean over cases by key, with the extras of a metric (``<key>/median``) after it."""
        return self.means(self.gathered())

    def means(self, gathered: dict[str, tuple[CaseMean, Cases]]) -> dict[str, float]:
        """Mean over cases by key, from gathered cases.

        Args:
            gathered: What :meth:`gathered` gave.
        """
        numbers: dict[str, float] = {}
        for key, (metric, cases) in gathered.items():
            numbers[key] = cases.values.mean().item()
            extras = metric.extras(cases.values)
            numbers.update({f"{key}/{name}": value for name, value in extras.items()})
        return numbers

    def summary(self) -> list[SummaryRow]:
        """Mean, bounds of the interval and number of cases, by key.

        Keys over the same cases share the draws of the bootstrap, as their own ``interval`` would
        draw them.
        """
        return self.rows({key: (m.is_share, c) for key, (m, c) in self.gathered().items()})

    def rows(self, entries: dict[str, tuple[bool, Cases]]) -> list[SummaryRow]:
        """Rows of a report in the order of ``entries``.

        Args:
            entries: By key, whether values are shares in ``[0, 1]``, and the cases.
        """
        bounds: dict[str, tuple[float, float]] = {}
        together: dict[tuple[int, ...], list[str]] = {}
        for key, (is_share, cases) in entries.items():
            votes = needs_wilson(cases.values, cases.clusters) if is_share else 0
            if votes:
                bounds[key] = wilson_interval(cases.values.mean().item(), votes, self.level)
            else:
                together.setdefault(tuple(cases.clusters.tolist()), []).append(key)
        for keys in together.values():
            values = torch.stack([entries[key][1].values for key in keys], dim=1)
            clusters = entries[keys[0]][1].clusters
            means = resampled_means(values, clusters, self.resamples, self.seed)
            for column, key in enumerate(keys):
                bounds[key] = percentile_interval(means[:, column], self.level)
        return [
            SummaryRow(key, cases.values.mean().item(), *bounds[key], len(cases.values))
            for key, (_, cases) in entries.items()
        ]

    def reset(self) -> None:
        """Forget all cases and keys."""
        self.metrics.clear()
