"""MALMEN: the ridge shift, value networks, the cached backward pass, and the edits."""

from __future__ import annotations

import math

import pytest
import torch

from kedit_lightning.methods.hypernetwork.normal_equations import NormalEquations
from kedit_lightning.methods.locate.solve import ridge_update, size_prior

# ---- the ridge shift

FEW, MANY = 12, 60
WIDTHS = (32, 16)


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return tuple(torch.randn(count, w, generator=generator).double() for w in WIDTHS)


def solved(keys, values, strength, parts=1):
    equations = NormalEquations(*WIDTHS)
    for own in zip(keys.tensor_split(parts), values.tensor_split(parts), strict=True):
        equations.add(*own)
    return equations.solve(torch.as_tensor(strength, dtype=torch.float64))


def dense(keys, values, strength):
    gram = keys.T @ keys + strength * torch.eye(WIDTHS[0]).double()
    return torch.linalg.solve(gram, keys.T @ values)


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("count", [FEW, WIDTHS[0], MANY])
def test_the_shift_solves_the_normal_equations(count, parts):  # MALMEN-1, MALMEN-2
    keys, values = rows(count)
    shift = solved(keys, values, 0.7, parts)
    assert (shift.keys is None) is (count > WIDTHS[0])
    left = keys.T @ (keys @ shift.matrix) + 0.7 * shift.matrix
    assert torch.allclose(left, keys.T @ values, atol=1e-10)
    assert torch.allclose(shift.matrix, dense(keys, values, 0.7), atol=1e-10)
    a, b = ridge_update(keys.T, values.T, size_prior(0.7), 1.0)
    assert torch.allclose(shift.matrix.T, b @ a, atol=1e-10)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_gradients_through_the_solve_are_those_of_autograd(count):  # MALMEN-3, RLEDIT-2
    keys, values = rows(count)
    wanted = rows(32)[1]
    values.requires_grad_()
    log_strength = torch.tensor(0.3).double().requires_grad_()
    shift = dense(keys, values, log_strength.exp())
    loss = (wanted * shift).sum() + 0.01 * shift.square().sum()
    expected = torch.autograd.grad(loss, [values, log_strength])

    found = solved(keys, values, log_strength.exp())
    unknown = found.unknown.clone().requires_grad_()
    matrix = unknown if found.keys is None else found.keys.T @ unknown
    loss = (wanted * matrix).sum() + 0.01 * found.squared_norm(unknown)
    (gradient,) = torch.autograd.grad(loss, unknown)
    pulled, slope = found.pull_back(gradient)
    parts = [
        found.gradient_of_values(pulled, keys[first : first + 5], first)
        for first in range(0, count, 5)
    ]
    assert torch.allclose(torch.cat(parts), expected[0], atol=1e-10)
    assert torch.allclose(slope * log_strength.exp(), expected[1], atol=1e-10)


def test_a_weak_and_a_strong_ridge_have_their_limits():
    keys, values = rows(FEW)
    assert torch.allclose(keys @ solved(keys, values, 1e-10).matrix, values, atol=1e-6)
    strong = 1e9 * solved(keys, values, 1e9).matrix
    assert torch.allclose(strong, keys.T @ values, rtol=1e-6, atol=1e-5)
    twice = solved(keys.repeat(2, 1), values.repeat(2, 1), 1e-10)
    assert torch.allclose(keys @ twice.matrix, values, atol=1e-4)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_the_order_of_rows_does_not_matter(count):
    keys, values = rows(count)
    turned = torch.randperm(count)
    shift = solved(keys[turned], values[turned], 0.5, 3)
    assert torch.allclose(shift.matrix, solved(keys, values, 0.5).matrix, atol=1e-10)


def test_equations_without_a_bounded_solution_give_nan():
    keys, values = rows(FEW)
    keys[3] = math.nan
    assert bool(solved(keys, values, 1.0).matrix.isnan().all())


def test_rows_held_have_a_bound():
    equations = NormalEquations(*WIDTHS)
    for _ in range(40):
        equations.add(*rows(FEW))
        assert sum(len(keys) for keys, _ in equations._held) <= WIDTHS[0]
