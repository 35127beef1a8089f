"""Tests of whether two methods differ on the same cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.stats import binomtest
from torch import Tensor


def mcnemar(a: Tensor | Sequence[float], b: Tensor | Sequence[float]) -> float:
    """Exact two-sided p-value that two methods hold equally often (McNemar 1947).

    Only cases on which they differ tell anything: of ``n`` such cases the number that the first
    alone holds is binomial with one half if they are equal. Without any the value is 1.

    Args:
        a: Whether the first method holds, 0 or 1 for each case. Shape ``[cases]``.
        b: The same of the second method on the same cases. Shape ``[cases]``.

    Raises:
        ValueError: The cases differ in number, or a value is neither 0 nor 1.

    >>> mcnemar([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1])
    0.0625
    """
    first, second = (torch.as_tensor(values, dtype=torch.float64) for values in (a, b))
    if first.shape != second.shape:
        raise ValueError(f"both must hold the same cases, got {len(first)} and {len(second)}")
    if not all(bool(((side == 0) | (side == 1)).all()) for side in (first, second)):
        raise ValueError("McNemar's test is about values of 0 and 1")
    only_first = int((first > second).sum())
    differing = int((first != second).sum())
    return float(binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0


def bootstrap_p(means: Tensor) -> float:
    """Two-sided p-value of a difference of zero, from its resampled means ``[resamples]``.

    Twice the smaller tail beyond zero, with one draw added so that it is never 0 (Davison and
    Hinkley 1997, equation 4.11).

    >>> bootstrap_p(torch.tensor([1.0, 2.0, 3.0]))
    0.5
    """
    draws = len(means) + 1
    tail = min(int((means <= 0).sum()), int((means >= 0).sum())) + 1
    return min(1.0, 2 * tail / draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for the number of tests, in their order (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
