"""Confidence intervals of means over cases.

Cases about one subject are not independent: an edit that fails for a subject tends to fail for all
its cases. So whole clusters are drawn with replacement (Efron 1979; Field and Welsh 2007). Each
function raises a ``ValueError`` without cases, or for clusters or a level that do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_DRAWS = 1 << 22  # held in memory at a time: 4 million of 8 bytes, twice


def _as_double(values: Tensor | Sequence[float], name: str) -> Tensor:
    tensor = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if tensor.dim() != 1 or len(tensor) == 0:
        raise ValueError(
            f"`{name}` must be one-dimensional with at least one case, got {list(tensor.shape)}"
        )
    return tensor


def _cluster_index(clusters: Tensor | Sequence[int] | None, cases: int) -> tuple[Tensor, int]:
    """Clusters renumbered from 0, shape ``[cases]``, and how many there are."""
    if clusters is None:
        return torch.arange(cases), cases
    ids = torch.as_tensor(clusters, dtype=torch.int64, device="cpu")
    if ids.shape != (cases,):
        raise ValueError(
            f"`clusters` must hold one id for each of {cases} cases, got {list(ids.shape)}"
        )
    unique, index = torch.unique(ids, return_inverse=True)
    return index, len(unique)


def resampled_means(
    values: Tensor,
    clusters: Tensor | Sequence[int] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Tensor:
    """Means of columns under resampling of clusters; every column sees the same draws.

    ``values`` are ``[cases, columns]``, the means over the drawn cases ``[resamples, columns]`` in
    float64 on the CPU. The other arguments are those of :func:`bootstrap_interval`.

    >>> resampled_means(torch.tensor([[1.0, 5.0], [0.0, 5.0]]), resamples=4).shape
    torch.Size([4, 2])
    """
    cases, columns = values.shape
    index, count = _cluster_index(clusters, cases)
    values = values.detach().to("cpu", torch.float64)
    # Shifting by the first case makes equal values exactly equal after resampling too.
    origin = values[0]
    sums = torch.zeros(count, columns + 1, dtype=torch.float64)
    sums[:, :columns].index_add_(0, index, values - origin)
    sums[:, columns] = torch.bincount(index, minlength=count).double()
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, columns, dtype=torch.float64)
    chunk = max(1, _DRAWS // count)
    for begin in range(0, resamples, chunk):
        rows = min(chunk, resamples - begin)
        drawn = torch.randint(count, (rows, count), generator=generator)
        times = torch.zeros(rows, count, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand(rows, count))
        pooled = times @ sums  # [rows, columns + 1]
        means[begin : begin + rows] = pooled[:, :columns] / pooled[:, columns:] + origin
    return means


def _tails(level: float) -> tuple[float, float]:
    if not 0.0 < level < 1.0:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}")
    return (1.0 - level) / 2, (1.0 + level) / 2


def percentile_interval(means: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The middle ``level`` of resampled means ``[resamples]``; NaN if one of them is.

    >>> percentile_interval(torch.arange(101.0), level=0.5)
    (25.0, 75.0)
    """
    ordered = means.sort().values
    if bool(ordered.isnan().any()):
        return math.nan, math.nan
    low, high = torch.quantile(ordered, torch.tensor(_tails(level), dtype=ordered.dtype)).tolist()
    return low, high


def bootstrap_interval(
    values: Tensor | Sequence[float],
    clusters: Tensor | Sequence[int] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, cases clustered by subject.

    Equal values, a single case or a single cluster give an interval without width. For shares in
    ``[0, 1]`` use :func:`share_interval`, which does not claim certainty there.

    Args:
        values: One value a case. Shape ``[cases]``.
        clusters: Cluster of each case; every case is its own when ``None``. Shape ``[cases]``.
        level: Coverage.
        resamples: How many times the clusters are drawn.
        seed: Seed of the draws.

    >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
    >>> round(low, 2), round(high, 2)
    (0.4, 0.6)
    >>> bootstrap_interval([0.0, 1.0] * 50, clusters=[0, 1] * 50)  # two subjects only
    (0.0, 1.0)
    """
    columns = _as_double(values, "values")[:, None]
    return percentile_interval(resampled_means(columns, clusters, resamples, seed)[:, 0], level)


def paired_difference(
    a: Tensor | Sequence[float],
    b: Tensor | Sequence[float],
    clusters: Tensor | Sequence[int] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of ``a - b`` over the same cases, and the bounds of its bootstrap interval.

    ``a`` and ``b`` hold the values of two methods on the same cases in the same order, ``[cases]``;
    the other arguments are those of :func:`bootstrap_interval`. Where all values are shares in
    ``[0, 1]`` the interval is that of :func:`loss_interval`.

    >>> paired_difference([1.0, 1.0, 0.0, 1.0], [0.5, 0.5, 0.0, 0.5])
    (0.375, 0.125, 0.5)
    >>> [round(number, 3) for number in paired_difference([1.0, 1.0], [1.0, 1.0])]
    [0.0, -0.658, 0.658]
    """
    first, second = _as_double(a, "a"), _as_double(b, "b")
    if first.shape != second.shape:
        raise ValueError(
            f"`a` and `b` must hold the same cases, got {len(first)} and {len(second)}"
        )
    shares = all(bool(((side >= 0) & (side <= 1)).all()) for side in (first, second))
    interval = loss_interval if shares else bootstrap_interval
    bounds = interval(first - second, clusters, level, resamples, seed)
    return (first - second).mean().item(), *bounds


def wilson_interval(share: float, cases: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share in ``[0, 1]`` of independent cases; NaN gives NaN bounds.

    >>> low, high = wilson_interval(1.0, 100)
    >>> round(low, 3), high
    (0.963, 1.0)

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if math.isnan(share):
        return math.nan, math.nan
    if not 0.0 <= share <= 1.0 or cases < 1:
        raise ValueError(f"`share` must lie in [0, 1] with at least one case, got {share}, {cases}")
    z = torch.special.ndtri(torch.tensor(_tails(level)[1], dtype=torch.float64)).item()
    centre = (share + z * z / (2 * cases)) / (1 + z * z / cases)
    half = z * math.sqrt(share * (1 - share) / cases + (z / (2 * cases)) ** 2) / (1 + z * z / cases)
    low = 0.0 if share == 0.0 else max(0.0, centre - half)
    high = 1.0 if share == 1.0 else min(1.0, centre + half)
    return low, high


def square_and_add_interval(share: float, cases: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share gained, in ``[-1, 1]``, lost where negative; NaN gives NaN bounds.

    It is the share of gains less that of losses, here one of them and 0. With the
    Wilson bounds ``l`` and ``u`` of each, the distance of the lower bound from it is
    ``√((gains - l_gains)² + (u_losses - losses)²)``, and the upper one the other way round.

    >>> [round(bound, 3) for bound in square_and_add_interval(0.0, 100)]
    [-0.037, 0.037]

    Source: Newcombe 1998, Interval estimation for the difference between independent proportions.
    """
    if math.isnan(share):
        return math.nan, math.nan
    gains, losses = max(share, 0.0), max(-share, 0.0)
    gains_low, gains_high = wilson_interval(gains, cases, level)
    losses_low, losses_high = wilson_interval(losses, cases, level)
    low = share - math.hypot(gains - gains_low, losses_high - losses)
    high = share + math.hypot(gains_high - gains, losses - losses_low)
    return max(-1.0, low), min(1.0, high)


def agreeing(values: Tensor, clusters: Tensor | Sequence[int] | None = None) -> int:
    """Number of clusters if all have the same mean, and 0 where they differ.

    Where they agree the bootstrap has no width: whatever is drawn, the mean stays.

    >>> agreeing(torch.ones(8)), agreeing(torch.tensor([1.0, 0.0]))
    (8, 0)
    >>> agreeing(torch.tensor([0.5, 0.5]))
    2
    """
    index, count = _cluster_index(clusters, len(values))
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, values.cpu().double())
    means = sums / torch.bincount(index, minlength=count)
    return count if count == 1 or torch.allclose(means, means[:1], rtol=0, atol=1e-12) else 0


def share_interval(
    values: Tensor | Sequence[float],
    clusters: Tensor | Sequence[int] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of a mean of shares in ``[0, 1]`` that claims no certainty where cases agree.

    Where all clusters have the same mean, or there is one only, the bootstrap gives no width. There
    it is :func:`wilson_interval` with one vote a cluster: for mean ``m`` of ``n`` clusters and the
    normal quantile ``z``, ``(m + z²/2n ± z √(m(1 - m)/n + z²/4n²)) / (1 + z²/n)``. No values in
    ``[0, 1]`` with mean ``m`` vary more than ``m(1 - m)``, so between 0 and 1 it errs on the wide
    side. Elsewhere it is :func:`bootstrap_interval`, with the same arguments.

    >>> [round(bound, 3) for bound in share_interval([0.5, 0.5])]
    [0.095, 0.905]
    >>> low, high = share_interval([1.0] * 100)
    >>> round(low, 3), high
    (0.963, 1.0)

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    tensor = _as_double(values, "values")
    if votes := agreeing(tensor, clusters):
        return wilson_interval(tensor.mean().item(), votes, level)
    return bootstrap_interval(tensor, clusters, level, resamples, seed)


def loss_interval(
    values: Tensor | Sequence[float],
    clusters: Tensor | Sequence[int] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """The same for a mean of differences in ``[-1, 1]`` between two shares of each case.

    Where all clusters agree it is :func:`square_and_add_interval` with one vote a cluster.

    >>> [round(bound, 3) for bound in loss_interval([0.5, 0.5])]
    [-0.273, 0.905]
    """
    tensor = _as_double(values, "values")
    if votes := agreeing(tensor, clusters):
        return square_and_add_interval(tensor.mean().item(), votes, level)
    return bootstrap_interval(tensor, clusters, level, resamples, seed)
