"""Intervals: against explicit resampling, closed forms, and cases where a bootstrap is blind."""

import math

import numpy as np
import pytest
import torch

from kedit_lightning.metrics.functional import (
    bootstrap,
    bootstrap_interval,
    loss_interval,
    paired_difference,
    share_interval,
    square_and_add_interval,
    wilson_interval,
)


def explicit_interval(values, clusters, resamples, seed, level=0.95):
    """Draw clusters, list their cases, take the mean: one resample at a time."""
    names = sorted(set(clusters))
    cases = {
        name: [v for v, c in zip(values, clusters, strict=True) if c == name] for name in names
    }
    drawn = torch.randint(
        len(names), (resamples, len(names)), generator=torch.Generator().manual_seed(seed)
    )
    means = [np.mean([value for i in row for value in cases[names[i]]]) for row in drawn.tolist()]
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2])


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_clustered_interval_equals_explicit_resampling(level):
    rng = np.random.default_rng(0)
    values, clusters = rng.normal(5, 2, 60).tolist(), rng.integers(-3, 9, 60).tolist()
    found = bootstrap_interval(values, clusters, level, resamples=300, seed=7)
    np.testing.assert_allclose(found, explicit_interval(values, clusters, 300, 7, level))


def test_unclustered_interval_equals_explicit_resampling():
    values = np.random.default_rng(1).normal(size=25).tolist()
    found = bootstrap_interval(values, resamples=300, seed=3)
    np.testing.assert_allclose(found, explicit_interval(values, list(range(25)), 300, 3))


def test_interval_has_the_width_that_theory_gives():
    values = [1.0] * 280 + [0.0] * 120
    low, high = bootstrap_interval(values)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 400)
    assert low == pytest.approx(0.7 - half, abs=0.004)
    assert high == pytest.approx(0.7 + half, abs=0.004)


def test_correlated_cases_widen_the_interval():
    values = [1.0] * 280 + [0.0] * 120
    clusters = [i // 4 for i in range(400)]  # four equal cases a subject: 100 votes, not 400
    low, high = bootstrap_interval(values, clusters)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert high - low == pytest.approx(2 * half, abs=0.015)


def test_equal_seeds_give_equal_bits_and_others_do_not():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_no_global_random_state_is_used():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    bootstrap_interval([0.0, 1.0])
    assert torch.equal(torch.rand(1), expected)


def test_memory_is_bounded_and_pieces_change_nothing(monkeypatch):
    values = torch.rand(40, generator=torch.Generator().manual_seed(0)).double()
    whole = bootstrap.resampled_means(values[:, None], resamples=100)
    shapes = []
    draw = torch.randint

    def spy(high, size, **kwargs):
        shapes.append(size)
        return draw(high, size, **kwargs)

    monkeypatch.setattr(bootstrap, "_DRAWS", 40 * 7)
    monkeypatch.setattr(torch, "randint", spy)
    pieces = bootstrap.resampled_means(values[:, None], resamples=100)
    assert shapes == [(7, 40)] * 14 + [(2, 40)]
    torch.testing.assert_close(pieces, whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1 / 3])
@pytest.mark.parametrize("cases", [1, 2, 50])
def test_equal_values_give_a_degenerate_interval(value, cases):
    assert bootstrap_interval([value] * cases) == (value, value)


@pytest.mark.parametrize(("successes", "cases"), [(0, 1), (1, 1), (7, 10), (100, 100), (0, 37)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_bounds_solve_their_equation(successes, cases, level):
    share = successes / cases
    z = {0.9: 1.6448536269514722, 0.95: 1.959963984540054}[level]
    for bound in wilson_interval(share, cases, level):
        # (share - bound)^2 = z^2 bound (1 - bound) / n, whose two roots are the bounds
        assert (share - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / cases, abs=1e-12)
    low, high = wilson_interval(share, cases, level)
    assert 0 <= low <= share <= high <= 1
    assert low < high


def test_shares_at_a_border_are_not_certain():
    assert share_interval([1.0] * 100) == wilson_interval(1.0, 100)
    assert share_interval([0.0] * 100) == wilson_interval(0.0, 100)
    # a hundred cases of ten subjects are ten votes
    assert share_interval([1.0] * 100, [i // 10 for i in range(100)]) == wilson_interval(1.0, 10)
    # one subject says nothing about the spread between subjects
    assert share_interval([1.0, 0.0], [4, 4]) == wilson_interval(0.5, 1)
    # nor do equal subjects, whatever their share, however it comes about
    for value in (0.5, 0.1, 1 / 3):
        assert share_interval([value] * 2) == wilson_interval(value, 2)
    assert share_interval([1.0, 0.0] * 3, [0, 0, 1, 1, 2, 2]) == wilson_interval(0.5, 3)
    uneven = share_interval([0.5, 0.5, 0.5, 1.0, 0.0], [0, 0, 0, 1, 1])
    assert uneven == wilson_interval(0.5, 2)
    # elsewhere the bootstrap stands
    values = [1.0] * 9 + [0.5]
    assert share_interval(values) == bootstrap_interval(values)


def test_pairs_tell_more_than_two_intervals():
    rng = np.random.default_rng(2)
    base = rng.normal(size=200)
    better = base + 0.05 + rng.normal(scale=0.05, size=200)
    mean, low, high = paired_difference(better.tolist(), base.tolist())
    assert mean == pytest.approx(np.mean(better - base))
    assert 0 < low < mean < high < 0.1
    assert (low, high) == bootstrap_interval((better - base).tolist())


def test_values_that_are_not_numbers_stay_visible():
    assert all(math.isnan(bound) for bound in bootstrap_interval([1.0, math.nan, 0.0]))
    assert all(math.isnan(bound) for bound in share_interval([math.nan]))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: bootstrap_interval([]), "values"),
        (lambda: bootstrap_interval(torch.zeros(2, 2)), "values"),
        (lambda: bootstrap_interval([1.0, 2.0], [1]), "clusters"),
        (lambda: bootstrap_interval([1.0, 2.0], level=95), "level"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "same cases"),
        (lambda: wilson_interval(1.5, 3), "share"),
        (lambda: wilson_interval(0.5, 0), "case"),
    ],
)
def test_wrong_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize("cases", [1, 2, 5, 100])
@pytest.mark.parametrize("share", [-1.0, -0.5, 0.0, 0.25, 1.0])
def test_differences_that_agree_have_a_width(share, cases):
    low, high = loss_interval([share] * cases)
    assert -1.0 <= low <= share <= high <= 1.0
    assert high - low > 1.0 / (cases + 4)
    assert loss_interval([-share] * cases) == pytest.approx((-high, -low), abs=1e-12)
    a, b = ([share] * cases, [0.0] * cases) if share >= 0 else ([0.0] * cases, [-share] * cases)
    assert paired_difference(a, b) == (share, low, high)


def test_differences_of_shares_that_agree_by_hand():
    # Without gains and losses the bound of either is z²/(n + z²).
    z = 1.959963984540054**2
    assert loss_interval([0.0] * 10) == pytest.approx((-z / (10 + z), z / (10 + z)))
    assert loss_interval([0.5] * 6, [0, 0, 1, 1, 2, 2]) == square_and_add_interval(0.5, 3)
    assert loss_interval([1.0, 0.0, 0.0]) == bootstrap_interval([1.0, 0.0, 0.0])
    assert all(math.isnan(bound) for bound in loss_interval([math.nan]))


def test_differences_of_other_numbers_keep_the_bootstrap():
    assert paired_difference([3.0, 3.0], [1.0, 1.0]) == (2.0, 2.0, 2.0)
