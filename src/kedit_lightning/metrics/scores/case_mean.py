"""Means over cases, with confidence intervals.

A case is one example of a benchmark at one stage. It counts once, however many probes it holds,
and cases about one subject form a cluster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.metrics.example_record import ProbeRecord
from kedit_lightning.metrics.functional.bootstrap import (
    agreeing,
    bootstrap_interval,
    square_and_add_interval,
    wilson_interval,
)
from kedit_lightning.metrics.measurement import Measurement
from kedit_lightning.probe_task import TaskName, scored_by
from kedit_lightning.requests import ProbeKind

_NO_NAME = -1


def name_id(name: str | None) -> int:
    """Hash of the name of a case or subject, equal in all processes; -1 for ``None``.

    >>> name_id("Eiffel Tower") == name_id("Eiffel Tower"), name_id(None)
    (True, -1)
    """
    if name is None:
        return _NO_NAME
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits fit an int64


class Cases(NamedTuple):
    """Values with the cases and clusters they belong to, in an order that no sharding changes."""

    values: Tensor  # [cases], float64
    clusters: Tensor  # [cases], int64
    ids: Tensor  # [cases], int64; -1 for a case without a name


class CaseMean(Metric):
    """Mean over cases, with a bootstrap interval over clusters of cases.

    ``update`` takes one value a case, and optionally its cluster id and its case id (see
    :func:`name_id`; -1 for none). ``compute`` returns the mean, a scalar tensor, and ``interval``
    the bounds of its confidence interval.
    ``level`` is the coverage of the interval; ``resamples`` draws of the bootstrap start at
    ``seed``. Further arguments are options of ``torchmetrics.Metric``.

    >>> metric = CaseMean()
    >>> metric.update([1.0, 0.0, 1.0, 1.0])
    >>> metric.compute()
    tensor(0.7500)
    """

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    # Whether values are shares in [0, 1], whose interval is that of `share_interval`.
    is_share: ClassVar[bool] = False
    # The interval of a share by its value and number of cases, where all of them agree.
    bounds = staticmethod(wilson_interval)

    # Rows of value bits, cluster, case. Integers, because a precision plugin that casts a module
    # to bfloat16 casts the floating states of its metrics too.
    rows: list[Tensor]

    def __init__(
        self, level: float = 0.95, resamples: int = 10_000, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.level = level
        self.resamples = resamples
        self.seed = seed
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(
        self,
        values: Tensor | Sequence[float],
        clusters: Tensor | Sequence[int] | None = None,
        cases: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Add cases: values, cluster ids (a case without one is its own) and ids, ``[cases]``."""
        numbers = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().reshape(-1)
        columns = [numbers.view(torch.int64)]
        for name, ids in (("clusters", clusters), ("cases", cases)):
            column = torch.full_like(columns[0], _NO_NAME)
            if ids is not None:
                column = torch.as_tensor(ids, dtype=torch.int64, device="cpu").reshape(-1)
            if column.shape != numbers.shape:
                raise ValueError(
                    f"`{name}` must hold one id for each of {len(numbers)} values, "
                    f"got {len(column)}"
                )
            columns.append(column)
        self.rows.append(torch.stack(columns, dim=1).to(self.device))
        if len(self.rows) >= 256:  # thousands of one-row tensors would cost more than their rows
            self.rows = [torch.cat(self.rows)]

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the cases of all processes; one without any contributes an empty table."""
        if isinstance(self.rows, list) and not self.rows:
            self.rows.append(torch.zeros(0, 3, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)

    def cases(self) -> Cases:
        """All cases of all processes.

        Raises:
            InvalidRequestError: A named case was added twice.
        """
        gather = self.sync_on_compute and not self._is_synced
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=gather, should_unsync=gather
        ):
            # A gathered state is one tensor already.
            table = dim_zero_cat(self.rows).cpu() if len(self.rows) else torch.zeros(0, 3).long()
        table = table[table[:, 2].argsort(stable=True)]
        ids = table[:, 2]
        named = ids[ids != _NO_NAME]
        if repeated := len(named) - len(named.unique()):
            raise InvalidRequestError(
                f"{type(self).__name__}: {repeated} cases were counted more than once; "
                "give examples different ids, reset metrics between runs, and shard examples with "
                "a sampler that repeats none"
            )
        clusters = torch.where(table[:, 1] == _NO_NAME, ids, table[:, 1])
        alone = (clusters == _NO_NAME).nonzero()[:, 0]
        clusters[alone] = -2 - torch.arange(len(alone))
        return Cases(table[:, 0].contiguous().view(torch.float64), clusters, ids)

    def compute(self) -> Tensor:
        """Mean over cases, NaN without any."""
        return torch.tensor(self.cases().values.mean().item(), device=self.device)

    def interval(self) -> tuple[float, float]:
        """Bounds of the mean's confidence interval, NaN without cases."""
        values, clusters, ids = self.cases()
        if len(values) == 0:
            return float("nan"), float("nan")
        bounds = self.agreed_interval(Cases(values, clusters, ids))
        return bounds or bootstrap_interval(values, clusters, self.level, self.resamples, self.seed)

    def agreed_interval(self, cases: Cases) -> tuple[float, float] | None:
        """Bounds for shares of which all clusters have the same mean; ``None`` elsewhere."""
        votes = agreeing(cases.values, cases.clusters) if self.is_share else 0
        return self.bounds(cases.values.mean().item(), votes, self.level) if votes else None

    def extras(self, values: Tensor) -> dict[str, float]:
        """Further statistics of the values ``[cases]`` of all cases, by name."""
        return {}


class ShareLoss(CaseMean):
    """Mean over cases of what each has lost of a share, between -1 and 1.

    >>> loss = ShareLoss()
    >>> loss.update([0.0, 0.0])
    >>> [round(bound, 3) for bound in loss.interval()]
    [-0.658, 0.658]
    """

    higher_is_better = False
    is_share = True
    bounds = staticmethod(square_and_add_interval)


class ProbeMean(CaseMean):
    """Mean over cases of a score that is computed from the records of probes.

    A subclass names its result, the kinds of probe it scores and the measurements it reads. Where
    the score is not the value of its first measurement after the edit, it overrides :meth:`read`.
    """

    #: Last part of the result key, as in ``rewrite/tf_tok``.
    name: ClassVar[str]
    #: Kinds of probe that are scored; by default those with a right answer after the edit.
    kinds: ClassVar[tuple[ProbeKind, ...]] = ("rewrite", "rephrase", "portability")
    #: Tasks whose probes alone are scored; all probes where there are none.
    tasks: ClassVar[tuple[TaskName, ...]] = ()
    #: Values that a probe's score can take, in words.
    value_range: ClassVar[str] = "0 to 1"
    #: Measurements that the score reads; the reader measures them.
    measurements: ClassVar[tuple[Measurement, ...]]

    @classmethod
    def scored(cls, probes: Iterable[ProbeRecord]) -> list[ProbeRecord]:
        """Those of some probes that the metric is about."""
        return [probe for probe in probes if scored_by(probe.get("task"), cls.tasks)]

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """Score of one probe from its record, ``None`` where its measurements are missing."""
        value = cls.measurements[0].of(probe["after"])
        return None if value is None else float(value)

    @classmethod
    def case_value(cls, probes: Iterable[ProbeRecord]) -> float | None:
        """Mean score of a case's probes, ``None`` if none of them has one."""
        scores = [score for score in map(cls.read, probes) if score is not None]
        return sum(scores) / len(scores) if scores else None
