"""Mean and variance of rows that come in batches."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

#: Mean, sum of squared deviations, and number of rows.
Moments: TypeAlias = tuple[Tensor, Tensor, Tensor]


def moments(rows: Tensor) -> Moments:
    """Mean, sum of squared deviations and count of rows ``[n, width]``; zeros without rows."""
    count = torch.tensor(len(rows), dtype=torch.int64, device=rows.device)
    mean = rows.sum(0) / count.clamp(min=1)
    return mean, (rows - mean).square().sum(0), count


def merge(first: Moments, second: Moments) -> Moments:
    """Moments of the union of two sets of rows.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm".
    """
    (mean_a, squares_a, count_a), (mean_b, squares_b, count_b) = first, second
    count = count_a + count_b
    share = count_b.to(mean_a) / count.clamp(min=1)
    apart = mean_b - mean_a
    squares = squares_a + squares_b + apart.square() * count_a * share
    return mean_a + apart * share, squares, count
