"""Metrics over cases, with confidence intervals.

A case is one example of a benchmark at one stage. It counts once, however many prompts it holds,
and cases about one subject form a cluster.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.metrics.example_record import ProbeRecord
from kedit_lightning.metrics.functional.bootstrap import bootstrap_interval, share_interval
from kedit_lightning.metrics.functional.divergence import unchanged_text
from kedit_lightning.metrics.functional.text_match import generation_contains, generation_exact

_NO_NAME = -1


def name_id(name: str | None) -> int:
    """A number for a name, the same on every machine and in every process.

    Args:
        name: Name of a case or subject; ``None`` gives -1, which equals no other.

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

    As input to ``update`` the metric accepts one value a case, and optionally one cluster id and
    one case id a case (see :func:`name_id`; -1 for none). As output of ``compute`` it returns the
    mean, a scalar tensor; ``interval`` returns the bounds of its confidence interval.

    Args:
        level: Coverage of the interval.
        resamples: Draws of the bootstrap.
        seed: Seed of the draws.
        kwargs: Options of ``torchmetrics.Metric``.

    >>> metric = CaseMean()
    >>> metric.update([1.0, 0.0, 1.0, 1.0])
    >>> metric.compute()
    tensor(0.7500)
    """

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    # Whether values are shares in [0, 1], whose interval is honest at the borders.
    is_share: ClassVar[bool] = False

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
        """Add cases.

        Args:
            values: One value a case. Shape ``[cases]``.
            clusters: Cluster ids; a case without one is a cluster of its own. Shape ``[cases]``.
            cases: Ids of the cases. Shape ``[cases]``.

        Raises:
            ValueError: The three differ in length.
        """
        numbers = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().reshape(-1)
        columns = [numbers.view(torch.int64)]
        for name, ids in (("clusters", clusters), ("cases", cases)):
            column = (
                torch.full_like(columns[0], _NO_NAME)
                if ids is None
                else torch.as_tensor(ids, dtype=torch.int64, device="cpu").reshape(-1)
            )
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
        """Gather the cases of all processes; one without any takes part with an empty table."""
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
        repeated = len(named) - len(named.unique())
        if repeated:
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
        values, clusters, _ = self.cases()
        if len(values) == 0:
            return float("nan"), float("nan")
        bounds = share_interval if self.is_share else bootstrap_interval
        return bounds(values, clusters, self.level, self.resamples, self.seed)

    def extras(self, values: Tensor) -> dict[str, float]:
        """Further numbers that describe the values, by name.

        Args:
            values: Values of all cases. Shape ``[cases]``.
        """
        return {}


class ProbeMean(CaseMean):
    """Mean over cases of a score that is read from the records of probes."""

    name: ClassVar[str]

    @staticmethod
    @abstractmethod
    def read(probe: ProbeRecord) -> float | None:
        """Score of one probe, ``None`` where the record does not hold what it needs."""

    @classmethod
    def case_value(cls, probes: Iterable[ProbeRecord]) -> float | None:
        """Mean score of a case's probes, ``None`` if none of them has one."""
        scores = [score for score in map(cls.read, probes) if score is not None]
        return sum(scores) / len(scores) if scores else None


class TokenMatch(ProbeMean):
    """Share of the answer's tokens that are arg-max, teacher-forced."""

    name = "tf_tok"
    is_share = True

    @staticmethod
    def read(probe: ProbeRecord) -> float | None:
        """The reading after the edit."""
        return probe["after"].get("tf_tok")


class ExactMatch(ProbeMean):
    """Share of probes whose answer tokens are all arg-max, for any accepted answer."""

    name = "tf_all"
    is_share = True

    @staticmethod
    def read(probe: ProbeRecord) -> float | None:
        """1 or 0, after the edit."""
        right = probe["after"].get("tf_all")
        return None if right is None else float(right)


class ProbabilityPreference(ProbeMean):
    """Share of probes whose answer is more likely than the contrast, by mean a token."""

    name = "p_new_gt_old"
    is_share = True

    @staticmethod
    def read(probe: ProbeRecord) -> float | None:
        """1 or 0 after the edit; a tie is 0."""
        new, old = probe["after"].get("log_prob"), probe["after"].get("contrast_log_prob")
        return None if new is None or old is None else float(new > old)


def _judge(probe: ProbeRecord, judge: Callable[[str, Sequence[str]], bool]) -> float | None:
    """What a judge says of the free answer after the edit; ``None`` where there is none."""
    text = probe["after"].get("text")
    if text is None or not probe["answers"]:
        return None
    return float(judge(text, probe["answers"]))


class GenerationExact(ProbeMean):
    """Share of probes whose free generation is an accepted answer and then stops."""

    name = "gen_em"
    is_share = True

    @staticmethod
    def read(probe: ProbeRecord) -> float | None:
        """1 or 0, after the edit."""
        return _judge(probe, generation_exact)


class GenerationContains(ProbeMean):
    """Share of probes whose free generation states an accepted answer."""

    name = "gen_contains"
    is_share = True

    @staticmethod
    def read(probe: ProbeRecord) -> float | None:
        """1 or 0, after the edit."""
        return _judge(probe, generation_contains)


class Inflation(ProbeMean):
    """How far teacher forcing flatters: token match minus exact generation."""

    name = "inflation"
    higher_is_better = False

    @staticmethod
    def read(probe: ProbeRecord) -> float | None:
        """Difference of the two scores, after the edit."""
        forced, free = TokenMatch.read(probe), GenerationExact.read(probe)
        return None if forced is None or free is None else forced - free


class UnchangedText(ProbeMean):
    """Share of probes to which the edited model writes what the base model writes."""

    name = "keep_text"
    is_share = True

    @staticmethod
    def read(probe: ProbeRecord) -> float | None:
        """1 or 0: the text after the edit equals the base model's."""
        base, after = probe["base"].get("text"), probe["after"].get("text")
        return None if base is None or after is None else float(unchanged_text(base, after))


class UnchangedTop1(ProbeMean):
    """Share of probes whose arg-max is the base model's at every position."""

    name = "keep_top1"
    is_share = True

    @staticmethod
    def read(probe: ProbeRecord) -> float | None:
        """1 or 0: the arg-max ids after the edit equal the base model's."""
        base, after = probe["base"].get("top1"), probe["after"].get("top1")
        return float(base == after) if base and after else None


class StillKnown(ProbeMean):
    """Share of answers still right among those that the base model had right."""

    name = "known"
    is_share = True

    @staticmethod
    def read(probe: ProbeRecord) -> float | None:
        """1 or 0 after the edit where the base model was right, else ``None``."""
        return ExactMatch.read(probe) if probe["base"].get("tf_all") else None


class BaseKL(ProbeMean):
    """KL divergence from the base model, mean over positions, in nats."""

    name = "kl"
    higher_is_better = False

    @staticmethod
    def read(probe: ProbeRecord) -> float | None:
        """The reading after the edit."""
        return probe["after"].get("kl")

    def extras(self, values: Tensor) -> dict[str, float]:
        """The 95th percentile over cases, where damage shows that a mean hides.

        Args:
            values: Values of all cases. Shape ``[cases]``.
        """
        return {"p95": torch.quantile(values, 0.95).item()}


class CostMean(CaseMean):
    """Mean cost of an edit, such as seconds or bytes; median and 95th percentile beside it.

    >>> cost = CostMean()
    >>> cost.update([1.0, 2.0, 3.0, 10.0])
    >>> cost.compute(), cost.extras(cost.cases().values)["median"]
    (tensor(4.), 2.5)
    """

    higher_is_better = False

    def extras(self, values: Tensor) -> dict[str, float]:
        """Median and 95th percentile over cases.

        Args:
            values: Values of all cases. Shape ``[cases]``.
        """
        half, high = torch.quantile(values, torch.tensor([0.5, 0.95], dtype=values.dtype)).tolist()
        return {"median": half, "p95": high}


ANSWER_SCORES: tuple[type[ProbeMean], ...] = (
    TokenMatch,
    ExactMatch,
    ProbabilityPreference,
    GenerationExact,
    GenerationContains,
    Inflation,
)
LOCALITY_SCORES: tuple[type[ProbeMean], ...] = (UnchangedText, UnchangedTop1, BaseKL, StillKnown)
