"""The equation that all closed-form editors share: its identities, in float64."""

from __future__ import annotations

import pytest
import torch

from kedit_lightning.edits import LowRankDelta
from kedit_lightning.errors import NonFiniteError
from kedit_lightning.methods import MEMIT, PMET
from kedit_lightning.methods.locate.shared import weight_constraints as constraints
from kedit_lightning.methods.locate.shared.covariance_factors import CovarianceFactors
from kedit_lightning.methods.locate.shared.least_squares import (
    NEAR,
    covariance_prior,
    known_priors,
    null_space_prior,
    relative_ridge,
    ridge_update,
    size_prior,
    with_history,
)
from kedit_lightning.statistics import main_directions

D_IN, D_OUT, N, WEIGHT = 24, 10, 5, 7.0


def spd(size: int, samples: int = 200) -> torch.Tensor:
    x = torch.randn(size, samples)
    return x @ x.T / samples


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def system():
    """Keys, residuals, second moment, and its prior."""
    moment = spd(D_IN)
    prior = covariance_prior(torch.linalg.cholesky(moment), WEIGHT)
    return torch.randn(D_IN, N), torch.randn(D_OUT, N), moment, prior


def delta(keys, residuals, prior, eps, **options):
    a, b = ridge_update(keys, residuals, prior, eps, **options)
    return b @ a


def close(found, expected, tolerance=1e-10):
    assert float((found - expected).norm()) <= tolerance * max(1.0, float(expected.norm()))


# ---- priors that know what several groups of keys ask for


def test_keys_of_several_groups_are_solved_for_at_once(system):
    keys, _, _, prior = system
    asked = []

    def counted(new):
        asked.append(new.shape[1])
        return prior(new)

    groups = [keys[:, :2], keys[:, 2:3], keys[:, 3:]]
    known = known_priors(counted, groups)
    assert asked == [N]
    for own, solve in zip(groups, known, strict=True):
        close(solve(own), prior(own), 1e-12)
        close(solve(2 * own), prior(2 * own), 1e-12)  # keys of which it does not know
    assert asked == [N, 2, 1, 2]
    assert known_priors(counted, groups[:1]) == [counted]


# ---- MEMIT: eps = 1


def test_dual_solution_solves_the_primal_normal_equations(system):
    keys, residuals, moment, prior = system
    found = delta(keys, residuals, prior, 1.0)
    close(found @ (WEIGHT * moment + keys @ keys.T), residuals @ keys.T)
    weight = torch.randn(D_OUT, D_IN)
    edited = (weight + found).requires_grad_(True)
    objective = (edited @ keys - weight @ keys - residuals).square().sum()
    objective = objective + WEIGHT * ((edited - weight) @ moment @ (edited - weight).T).trace()
    (gradient,) = torch.autograd.grad(objective, edited)
    assert gradient.norm() < 1e-9


def test_order_is_irrelevant_and_a_repeated_edit_counts_twice(system):
    keys, residuals, moment, prior = system
    order = torch.randperm(N)
    close(
        delta(keys[:, order], residuals[:, order], prior, 1.0), delta(keys, residuals, prior, 1.0)
    )
    twice = delta(
        torch.cat([keys, keys[:, :1]], 1), torch.cat([residuals, residuals[:, :1]], 1), prior, 1.0
    )
    counts = torch.ones(N)
    counts[0] = 2
    expected = (residuals * counts) @ keys.T
    close(twice, expected @ torch.linalg.inv(WEIGHT * moment + (keys * counts) @ keys.T))


def test_weight_decides_between_all_and_nothing(system):
    keys, residuals, moment, _ = system
    factor = torch.linalg.cholesky(moment)
    close(delta(keys, residuals, covariance_prior(factor, 1e-12), 1.0) @ keys, residuals, 1e-6)
    assert delta(keys, residuals, covariance_prior(factor, 1e12), 1.0).norm() < 1e-8


def test_a_lone_key_gets_a_known_share_of_its_residual(system):
    keys, residuals, moment, prior = system
    key, residual = keys[:, :1], residuals[:, :1]
    g = float(key.T @ torch.linalg.solve(WEIGHT * moment, key))
    close(delta(key, residual, prior, 1.0) @ key, residual * g / (1 + g))


# ---- EMMET: other eps


def test_equality_is_met_whatever_the_weight_and_at_the_least_cost(system):
    keys, residuals, moment, prior = system
    found = delta(keys, residuals, prior, 0.0)
    close(found @ keys, residuals)
    close(found, delta(keys, residuals, covariance_prior(torch.linalg.cholesky(moment)), 0.0))
    rows = found @ moment  # the condition of Karush, Kuhn and Tucker
    close(rows @ keys @ torch.linalg.solve(keys.T @ keys, keys.T), rows)
    other = found + torch.randn(D_OUT, D_IN) @ (torch.eye(D_IN) - keys @ torch.linalg.pinv(keys))
    assert (found @ moment @ found.T).trace() < (other @ moment @ other.T).trace()


def test_eps_goes_from_equality_to_memit_and_scales_the_weight(system):
    keys, residuals, moment, prior = system
    missed = [(residuals - delta(keys, residuals, prior, eps) @ keys).norm() for eps in (0, 0.1, 1)]
    assert missed == sorted(missed)
    factor = torch.linalg.cholesky(moment)
    scaled = covariance_prior(factor, 0.1 * WEIGHT)
    close(delta(keys, residuals, prior, 0.1), delta(keys, residuals, scaled, 1.0))
    apart = torch.eye(D_IN)[:, :N] * torch.tensor([1.0, 2, 3, 4, 5])
    close(
        delta(apart, residuals, size_prior(), 0.3, relative=True),
        delta(apart, residuals, size_prior(), 0.3 * 11),
    )


def test_a_relative_weight_grows_only_for_keys_that_nearly_equal_others():
    cosine = torch.tensor(0.5)
    keys = torch.eye(4)
    keys[:, 1] = torch.stack([cosine, (1 - cosine**2).sqrt(), *torch.zeros(2)])
    keys[:, 3] = -keys[:, 2]
    found = relative_ridge(2 * keys.T @ keys, 0.1)
    expected = 0.2 * (1 + NEAR * torch.tensor([0.5, 0.5, 0, 0]) ** 8)
    torch.testing.assert_close(found, expected)
    assert not relative_ridge(keys.T @ keys, 0.0).any()
    torch.testing.assert_close(relative_ridge(torch.eye(1), 0.1), torch.tensor([0.1]))


@pytest.mark.parametrize("wordings", [2, 4])
def test_wordings_of_one_fact_cost_no_more_than_one(system, wordings):
    keys, residuals, _, prior = system
    alike = keys[:, :1] + 0.01 * torch.randn(D_IN, wordings)
    values = residuals[:, :1] + 0.1 * torch.randn(D_OUT, wordings)
    one = delta(alike[:, :1], values[:, :1], prior, 1e-3, relative=True)
    several = delta(alike, values, prior, 1e-3, relative=True)
    exact = delta(alike, values, prior, 0.0)
    assert exact.norm() > 3 * one.norm()
    assert several.norm() < 1.2 * one.norm()
    assert (several @ alike - values).norm() < 0.15 * values.norm()


def test_keys_that_are_combinations_of_each_other_need_eps(system):
    keys, residuals, _, prior = system
    keys = torch.cat([keys, keys[:, :1]], 1)
    residuals = torch.cat([residuals, -residuals[:, :1]], 1)
    with pytest.raises(NonFiniteError, match=r"set eps above 0"):
        ridge_update(keys, residuals, prior, 0.0)
    assert torch.isfinite(delta(keys, residuals, prior, 1.0)).all()


# ---- history


def test_history_adds_earlier_keys_to_the_cost(system):
    keys, residuals, moment, prior = system
    for count in (7, 40):  # more keys than dimensions are folded
        old = torch.randn(D_IN, count)
        cost = WEIGHT * moment + old @ old.T
        found = delta(keys, residuals, with_history(prior, old), 1.0)
        close(found @ (cost + keys @ keys.T), residuals @ keys.T)


def test_ridge_of_encore_adds_to_the_cost(system):
    keys, residuals, moment, _ = system
    shifted = moment + 3.0 / WEIGHT * torch.eye(D_IN)
    found = delta(keys, residuals, covariance_prior(torch.linalg.cholesky(shifted), WEIGHT), 1.0)
    cost = WEIGHT * moment + 3.0 * torch.eye(D_IN)
    close(found @ (cost + keys @ keys.T), residuals @ keys.T)


# ---- AlphaEdit


@pytest.fixture
def null_space():
    """A second moment of rank 9, the directions it uses, and the projector on the others."""
    x = torch.randn(D_IN, 9)
    moment = x @ x.T / 9
    used, _ = main_directions(moment, energy=1e-9)
    assert used.shape == (D_IN, 9)
    return moment, used, torch.eye(D_IN) - used @ used.T


def test_recursive_state_equals_the_published_system_and_spares_typical_keys(null_space):
    moment, used, project = null_space
    cost = 10.0
    prior = null_space_prior(used, cost)
    history = torch.zeros(D_IN, 0)
    for _ in range(5):
        keys, residuals = torch.randn(D_IN, 6), torch.randn(D_OUT, 6)
        state = with_history(prior, history) if history.shape[1] else prior
        found = delta(keys, residuals, state, 1.0)
        system = project @ (keys @ keys.T + history @ history.T) + cost * torch.eye(D_IN)
        close(found, torch.linalg.solve(system, project @ keys @ residuals.T).T)
        close(found @ project, found)
        assert (found @ moment).norm() < 1e-10
        history = torch.cat([history, keys], dim=1)


def test_batches_with_fixed_targets_equal_one_joint_solve_in_any_order(null_space):
    _, used, project = null_space
    cost, weight = 10.0, torch.randn(D_OUT, D_IN)
    prior = null_space_prior(used, cost)
    batches = [(torch.randn(D_IN, 4), torch.randn(D_OUT, 4)) for _ in range(3)]

    def sequence(order):
        edited, history = weight, torch.zeros(D_IN, 0)
        for keys, values in (batches[i] for i in order):
            state = with_history(prior, history) if history.shape[1] else prior
            edited = edited + delta(keys, values - edited @ keys, state, 1.0)
            history = torch.cat([history, keys], dim=1)
        return edited

    keys, values = (torch.cat(parts, 1) for parts in zip(*batches, strict=True))
    system = cost * torch.eye(D_IN) + project @ keys @ keys.T
    joint = weight + torch.linalg.solve(system, project @ keys @ (values - weight @ keys).T).T
    close(sequence((0, 1, 2)), joint)
    close(sequence((2, 0, 1)), joint)


def test_the_null_space_grows_with_the_energy_it_may_hold():
    moment = spd(D_IN)
    sizes = [main_directions(moment, energy)[0].shape[1] for energy in (0.0, 0.1, 0.5, 1.0)]
    assert sizes[0] == D_IN
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 0
    values = torch.linalg.eigvalsh(moment)
    by_threshold, _ = main_directions(moment, 0.0, threshold=float(values[10]))
    assert by_threshold.shape[1] == D_IN - 10
    keys, residuals = torch.randn(D_IN, N), torch.randn(D_OUT, N)
    nothing = delta(keys, residuals, null_space_prior(torch.eye(D_IN), 1.0), 1.0)
    assert nothing.norm() < 1e-12
    everything = delta(keys, residuals, null_space_prior(torch.zeros(D_IN, 0), WEIGHT), 1.0)
    plain = covariance_prior(torch.eye(D_IN), WEIGHT)
    close(everything, delta(keys, residuals, plain, 1.0))


def test_the_directions_of_a_wide_layer_are_found_once(monkeypatch):
    moment = spd(D_IN)
    found = main_directions(moment, 0.1)
    monkeypatch.setattr("kedit_lightning.statistics.null_space.CACHED_WIDTH", 8)
    first = main_directions(moment, 0.1)
    monkeypatch.setattr(torch.linalg, "eigh", None)  # it would fail if it were asked again
    again = main_directions(moment, 0.1)
    for part in zip(found, first, again, strict=True):
        assert torch.equal(part[0], part[1])
        assert torch.equal(part[0], part[2])
    with pytest.raises(TypeError):
        main_directions(moment, 0.2)


def test_only_the_last_of_wide_layers_is_held():
    made = []

    def make(name, width):
        made.append(name)
        return torch.zeros(width, width, dtype=torch.float64), None

    held = CovarianceFactors(None, "auto", "MEMIT")
    for name in ("a", "b", "a"):
        held.cached(name, lambda name=name: make(name, 8))
    assert made == ["a", "b"]  # both are small
    for name in ("c", "d", "c"):  # 32 MB each
        held.cached(name, lambda name=name: make(name, 2049))
    assert made == ["a", "b", "c", "d", "c"]
    held.clear()
    held.cached("c", lambda: make("c", 8))
    assert made[-1] == "c"


# ---- spread, and what comes after the solution


def test_layers_take_the_shares_that_the_papers_state():
    shares = {kind: [1 / left**kind.spread for left in (5, 4, 3, 2, 1)] for kind in (MEMIT, PMET)}
    assert shares[MEMIT] == pytest.approx([1 / 5, 1 / 4, 1 / 3, 1 / 2, 1])
    assert shares[PMET] == pytest.approx([5**-0.5, 1 / 2, 3**-0.5, 2**-0.5, 1])


def test_rect_keeps_the_entries_that_change_most():
    change, weight = torch.randn(D_OUT, D_IN), torch.randn(D_OUT, D_IN)
    kept = constraints.keep_largest(change, weight, 0.2)
    assert int((kept != 0).sum()) == round(0.2 * change.numel())
    ratio = (change / weight).abs()
    assert ratio[kept != 0].min() > ratio[kept == 0].max()
    assert torch.equal(kept[kept != 0], change[kept != 0])
    assert torch.equal(constraints.keep_largest(change, weight, 1.0), change)


def test_prune_compresses_singular_values_above_those_of_the_weight():
    a, b, weight = torch.randn(4, D_IN), 6 * torch.randn(D_OUT, 4), torch.randn(D_OUT, D_IN)
    largest = torch.linalg.matrix_norm(weight, 2)
    before = torch.linalg.svdvals(b @ a)[:4]
    new_a, new_b = constraints.restrained(LowRankDelta(a, b), weight)
    after = torch.linalg.svdvals(new_b @ new_a)[:4]
    assert (before > largest).any()
    expected = torch.where(before > largest, before.log() - largest.log() + largest, before)
    close(after, expected.sort(descending=True).values)
    u, _, v = torch.linalg.svd(b @ a, full_matrices=False)
    close((u[:, :4] * expected) @ v[:4], new_b @ new_a)
    same = constraints.restrained(LowRankDelta(a, b), 100 * weight)
    assert same[0] is a
    assert same[1] is b


def test_sphere_leaves_nothing_in_the_main_directions_of_the_weight():
    a, weight = torch.randn(4, D_IN), torch.randn(D_OUT, D_IN) @ torch.diag(torch.rand(D_IN) ** 3)
    rows = weight / weight.norm(dim=1, keepdim=True)
    _, sigma, v = torch.linalg.svd(rows)
    energy = sigma.square().cumsum(0) / sigma.square().sum()
    count = int((energy < 0.5).sum()) + 1
    main = v[:count].T
    assert (constraints.off_main_directions(a, weight, 1.0) @ main).norm() < 1e-10
    close(constraints.off_main_directions(a, weight, 0.3) @ main, 0.7 * a @ main)
    close(constraints.off_main_directions(a, weight, 0.0), a)
