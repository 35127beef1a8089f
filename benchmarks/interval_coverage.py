"""How often the intervals of results cover the truth: 95 % ± 2 is wanted.

    python benchmarks/interval_coverage.py
    python benchmarks/interval_coverage.py --samples 500

Records are drawn whose true means are known, and the share of 95 % intervals that hold them is
counted. Cases of one subject share a part of their luck. Wilson's intervals need no drawing: their
coverage follows from the binomial distribution.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import binom

from kedit_lightning.metrics.functional import (
    bootstrap_interval,
    paired_difference,
    share_interval,
    wilson_interval,
)

#: Draws values ``[cases]``; the second result is the cluster of each case.
Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


def clustered_shares(share: float, subjects: int, cases: int, luck: float) -> Draw:
    """Cases that hold or not, with probabilities that differ from subject to subject.

    Args:
        share: Mean probability.
        subjects: Number of subjects.
        cases: Cases of each.
        luck: How much of it a subject's cases share, above 0 and below 1: their correlation.
    """

    def draw(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        strength = 1 / luck - 1
        of_subject = random.beta(share * strength, (1 - share) * strength, subjects)
        held = random.random((subjects, cases)) < of_subject[:, None]
        return held.ravel().astype(float), np.repeat(np.arange(subjects), cases)

    return draw


def skewed_values(subjects: int, cases: int) -> Draw:
    """Divergences: exponential of mean 1, half of it shared by the cases of a subject."""

    def draw(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        common = random.exponential(size=(subjects, 1))
        values = (common + random.exponential(size=(subjects, cases))) / 2
        return values.ravel(), np.repeat(np.arange(subjects), cases)

    return draw


def coverage(
    draw: Draw, truth: float, interval: Callable[..., tuple[float, float]], samples: int
) -> float:
    """Share of samples whose interval holds the truth."""
    held = 0
    for sample in range(samples):
        values, clusters = draw(np.random.default_rng(sample))
        low, high = interval(
            torch.from_numpy(values), torch.from_numpy(clusters), resamples=1000, seed=sample
        )
        held += low <= truth <= high
    return held / samples


def difference_coverage(gain: float, subjects: int, cases: int, samples: int) -> float:
    """The same for a paired difference of two methods, the second better by ``gain``."""

    def interval(values: torch.Tensor, clusters: torch.Tensor, seed: int, **options: int) -> tuple:
        random = np.random.default_rng([seed, 1])
        better = torch.from_numpy(random.random(len(values)) < 2 * gain)  # of those that fail
        second = torch.where(better, torch.ones(()), values)
        return paired_difference(second, values, clusters, seed=seed, **options)[1:]

    return coverage(clustered_shares(0.5, subjects, cases, 0.3), gain, interval, samples)


def wilson_coverage(cases: int, shares: np.ndarray) -> np.ndarray:
    """Coverage of Wilson's interval for each true share, without drawing."""
    bounds = np.array([wilson_interval(held / cases, cases) for held in range(cases + 1)])
    inside = (bounds[:, :1] <= shares) & (shares <= bounds[:, 1:])  # [held, shares]
    return (binom.pmf(np.arange(cases + 1)[:, None], cases, shares) * inside).sum(0)


def table(samples: int) -> dict[str, float]:
    """Coverage by what was drawn."""
    rows = {
        f"shares of mean {share}, {subjects} subjects of {cases}": coverage(
            clustered_shares(share, subjects, cases, 0.3), share, share_interval, samples
        )
        for share, subjects, cases in [(0.5, 100, 1), (0.5, 100, 4), (0.8, 100, 2), (0.9, 200, 2)]
    }
    rows["divergences, 100 subjects of 2"] = coverage(
        skewed_values(100, 2), 1.0, bootstrap_interval, samples
    )
    rows["paired difference of 0.1, 100 subjects of 2"] = difference_coverage(0.1, 100, 2, samples)
    shares = np.linspace(0.02, 0.98, 193)
    for cases in (20, 100, 1000):
        rows[f"Wilson, {cases} cases, mean over shares"] = wilson_coverage(cases, shares).mean()
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=2000)
    for name, share in table(parser.parse_args().samples).items():
        print(f"{name:45} {100 * share:.1f} %")


if __name__ == "__main__":
    main()
