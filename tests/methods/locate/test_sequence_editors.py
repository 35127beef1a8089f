"""LyapLock and NSE: closed forms for sequences against dense solves, and on live models."""

from __future__ import annotations

import pytest
import torch
from support import REQUESTS, tiny_base

from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import MEMIT, NSE, LyapLock
from kedit_lightning.methods.locate.lyaplock import joint_update, next_queue
from kedit_lightning.methods.locate.nse import chosen_neurons
from kedit_lightning.methods.locate.shared.least_squares import (
    covariance_prior,
    neuron_prior,
    with_history,
)

D_IN, D_OUT = 12, 6
QUICK = {"statistics": "identity", "contexts": 2, "steps": 4, "preserve": 1.0, "layers": [0, 1]}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(one, other):
    first, second = one.deltas(), other.deltas()
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-8, atol=1e-10)


@pytest.fixture
def system():
    """Weights before and now, old keys and outputs, new keys and residuals, text, its weight."""
    text = random(D_IN, 50, seed=1)
    before, now = random(D_OUT, D_IN, seed=2), random(D_OUT, D_IN, seed=3)
    old, new = random(D_IN, 4, seed=4), random(D_IN, 3, seed=5)
    return before, now, old, random(D_OUT, 4, seed=6), new, random(D_OUT, 3, seed=7), text, 2.5


# ---- LyapLock


def joint(system):
    before, now, old, outputs, new, residuals, text, weight = system
    prior = covariance_prior(torch.linalg.cholesky(text @ text.T / 50), weight)
    keys = torch.cat([old, new], 1)
    wanted = torch.cat([outputs - before @ old, residuals + (now - before) @ new], 1)
    return joint_update(keys, wanted, now - before, prior).dense


def test_the_step_is_that_of_the_paper(system):
    before, now, old, outputs, new, residuals, text, weight = system
    moment = text @ text.T / 50
    right = residuals @ new.T + outputs @ old.T - now @ old @ old.T
    right = right + weight * (before @ moment - now @ moment)
    left = new @ new.T + old @ old.T + weight * moment
    expected = torch.linalg.solve(left, right.T).T
    torch.testing.assert_close(joint(system), expected, rtol=1e-9, atol=1e-10)


def test_the_step_is_stationary_for_new_facts_old_ones_and_plain_text(system):
    before, now, old, outputs, new, residuals, text, weight = system
    delta = joint(system).requires_grad_(True)
    loss = (delta @ new - residuals).square().sum()
    loss = loss + ((now + delta) @ old - outputs).square().sum()
    loss = loss + weight * ((now + delta) @ text - before @ text).square().sum() / 50
    (gradient,) = torch.autograd.grad(loss, delta)
    assert gradient.norm() < 1e-9


def test_the_queue_is_that_of_the_paper_in_units_of_its_start():
    budget, first, drifts = 3.0, 0.5, [0.5, 4.0, 1.0, 2.0, 0.1]
    start = (budget * first) ** 0.5
    queue, mine = start, 1.0
    for drift in drifts:
        queue = max(queue + (drift - budget * first) / start, start)
        mine = next_queue(mine, drift, first, budget)
        assert mine == pytest.approx(queue / start)
    assert next_queue(1.0, 1.0, 0.0, 60.0) > 1


def test_the_first_edit_is_memit_and_the_next_ones_solve_jointly_from_the_weights_before():
    base = tiny_base("llama")
    one = {**QUICK, "layers": [1]}
    method = LyapLock(base, **one, budget=1e-3)
    with base.edits.restored():
        first = method.edit(REQUESTS[:2])
        close(first, MEMIT(base, **one).edit(REQUESTS[:2]))
        first.apply()
        module = method.edited[0]
        weight = method.queue(module)
        assert weight == pytest.approx(1 + 1e3 - 1)  # what is lost is a thousand budgets
        second = method.edit(REQUESTS[2:3])
        with torch.enable_grad():
            residual = method.layer_values(REQUESTS[2:3]).residuals(1)
        key = method.mean_keys(method._states([module], REQUESTS[2:3]).inputs[module])
        before = first.deltas()[f"{module}.weight"]
        old = first.memory[f"{module}.keys"].double()
        keys = torch.cat([old, key.T], 1)
        wanted = torch.cat([before @ old, residual.T + before @ key.T], 1)
        gram = weight * torch.eye(len(keys), dtype=keys.dtype) + keys @ keys.T
        total = torch.linalg.solve(gram, keys @ wanted.T).T
        found = second.deltas()[f"{module}.weight"]
        torch.testing.assert_close(before + found, total, rtol=1e-7, atol=1e-9)
        assert float(second.memory[f"{module}.queue"][0]) == pytest.approx(weight)
        drift = float(second.memory[f"{module}.queue"][1])
        assert drift == pytest.approx(float(total.square().sum()))


def test_lyaplock_without_a_history_is_refused():
    with pytest.raises(UnsupportedUseError, match="leave history out"):
        LyapLock(tiny_base("llama"), **QUICK, history=False).edit(REQUESTS[:1])


# ---- NSE


def test_one_round_of_all_neurons_is_memit_on_an_empty_stack():
    base = tiny_base("gpt2")
    close(NSE(base, **QUICK, rounds=1).edit(REQUESTS), MEMIT(base, **QUICK).edit(REQUESTS))


def test_values_are_those_of_the_original_weights():
    base = tiny_base("llama")
    method = NSE(base, **QUICK)
    method.configure_model()
    with torch.enable_grad():
        clean = method.layer_values(REQUESTS).values(1)
        with method.edit(REQUESTS[:2]):
            found = method.layer_values(REQUESTS).values(1)
            other = MEMIT(base, **QUICK)
            other.configure_model()
            assert not torch.allclose(other.layer_values(REQUESTS).values(1), clean)
    torch.testing.assert_close(found, clean, rtol=0, atol=0)


def test_the_prior_of_neurons_is_that_of_their_part_of_the_cost(system):
    old, new, text, weight = system[2], system[4], system[6], system[7]
    chosen = torch.arange(D_IN) % 3 > 0
    moment = text @ text.T / 50
    prior = with_history(covariance_prior(torch.linalg.cholesky(moment), weight), old)
    part = (weight * moment + old @ old.T)[chosen][:, chosen]
    expected = torch.zeros_like(new)
    expected[chosen] = torch.linalg.solve(part, new[chosen])
    torch.testing.assert_close(neuron_prior(prior, chosen)(new), expected, rtol=1e-9, atol=1e-10)


def test_neurons_are_the_fewest_that_hold_the_share_of_a_key():
    keys = torch.tensor([[4.0, 0.0], [-3.0, 1.0], [2.0, 0.0], [1.0, 9.0]])
    assert chosen_neurons(keys[:, :1], 0.7).tolist() == [True, True, False, False]
    assert chosen_neurons(keys, 0.7).tolist() == [True, True, False, True]
    assert bool(chosen_neurons(keys, 1.0).all())


def test_only_chosen_neurons_change_and_more_rounds_miss_less():
    base = tiny_base("llama")
    edit = NSE(base, **QUICK, neuron_share=0.5).edit(REQUESTS[:1])
    for delta in edit.deltas().values():
        unchanged = (delta.abs().sum(0) == 0).double().mean()
        assert 0.2 < unchanged < 0.9
    left = []
    for rounds in (1, 3):
        method = NSE(base, **{**QUICK, "preserve": 5.0}, rounds=rounds, tolerance=0.01)
        method.configure_model()
        with torch.enable_grad():
            values = method.layer_values(REQUESTS)
            values.values(1)
        with method.edit(REQUESTS):
            left.append(values.residuals(1).norm(dim=1))
    assert (left[1] < 0.9 * left[0]).all()


def test_a_fact_that_is_written_has_no_more_rounds_beside_one_that_is_not():
    base = tiny_base("llama")
    method = NSE(base, **QUICK, rounds=3, tolerance=0.6)
    alone = [method.edit([request]) for request in REQUESTS[1:3]]
    assert alone[0].nbytes < alone[1].nbytes  # the second takes more rounds
    together = [*method.edit_each([REQUESTS[1:2], REQUESTS[2:3]])]
    assert [edit.nbytes for edit in together] == [edit.nbytes for edit in alone]
    close(together[0], alone[0])
    relative = NSE(base, **{**QUICK, "preserve": None}, rounds=3).edit(REQUESTS[1:2])
    assert len(relative.origin.notes["preserve"]) == len(QUICK["layers"])
