"""MALMEN: the ridge shift, value networks, the cached backward pass, and the edits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from episode_support import EXAMPLES, batch_gradient, spoiled_losses
from fit_support import SaveEachStep, fit, state
from hypernetwork_support import rows_of
from malmen_support import (
    FEW,
    MANY,
    METRICS,
    SMALL,
    WIDTHS,
    check_ranks,
    cost,
    dense,
    end_to_end,
    malmen,
    rows,
    solved,
    stirred,
    write,
)
from support import FAMILIES, REQUESTS, tiny_base

from kedit_lightning import Edit, EditBatch
from kedit_lightning.edits import DenseEdit, LowRankEdit
from kedit_lightning.errors import NonFiniteError
from kedit_lightning.methods import MALMEN
from kedit_lightning.methods.hypernetwork.shared import shift_gradient
from kedit_lightning.methods.hypernetwork.shared.outer_loss import outer_losses
from kedit_lightning.methods.hypernetwork.shared.parameter_shift import (
    capture_parts,
)
from kedit_lightning.methods.hypernetwork.shared.shift_gradient import WeightedEpisodes
from kedit_lightning.methods.locate.shared.least_squares import ridge_update, size_prior

#: All tokens of the tests' requests are more than the inputs of the first projection of an MLP.
PROJECTIONS = {"answer": "down", "all": "all"}

# ---- the ridge shift


@pytest.mark.parametrize("size", METRICS)
@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("count", [FEW, WIDTHS[0], MANY])
def test_the_shift_solves_the_normal_equations(count, parts, size):  # MALMEN-1, MALMEN-2
    keys, values = rows(count)
    shift = solved(keys, values, 0.7, parts, METRICS[size])
    assert (shift.keys is None) is (count > WIDTHS[0])
    assert torch.allclose(shift.matrix, dense(keys, values, 0.7, METRICS[size]), atol=1e-10)
    if size == "norm":
        left = keys.T @ (keys @ shift.matrix) + 0.7 * shift.matrix
        assert torch.allclose(left, keys.T @ values, atol=1e-10)
        a, b = ridge_update(keys.T, values.T, size_prior(0.7), 1.0)
        assert torch.allclose(shift.matrix.T, b @ a, atol=1e-10)


@pytest.mark.parametrize("size", METRICS)
@pytest.mark.parametrize("count", [FEW, MANY])
def test_gradients_through_the_solve_are_those_of_autograd(count, size):  # MALMEN-3, RLEDIT-2
    keys, values = rows(count)
    wanted = rows(32)[1]
    values.requires_grad_()
    log_strength = torch.tensor(0.3).double().requires_grad_()
    shift = dense(keys, values, log_strength.exp(), METRICS[size])
    loss = (wanted * shift).sum() + 0.01 * shift.square().sum()
    expected = torch.autograd.grad(loss, [values, log_strength])

    found = solved(keys, values, log_strength.exp(), metric=METRICS[size])
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


# ---- networks and edits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_one_key_and_a_weak_ridge_give_a_step_of_gradient_descent(kind):  # MALMEN-4
    base = tiny_base(kind)
    request = next(r for r in REQUESTS if int(rows_of(base, [r]).answer_mask.sum()) == 1)
    method = malmen(base, normalise=False, edit_lr=0.01, ridge=1e-12)
    edit = method.edit([request])
    (part,) = capture_parts(base, method.network, [request], 1)
    for name, factors in part.items():
        (key,), (slope,) = factors.inputs, factors.gradients  # those of the answer's one token
        delta = edit.deltas()[f"{name}.weight"]
        step = -0.01 * torch.outer(slope, key)
        step = step if type(base.module(name)).__name__ == "Linear" else step.T
        assert torch.allclose(delta, step, rtol=1e-6, atol=1e-10)
        assert float(step.abs().max()) > 1e-8


def test_the_block_clamps_before_it_scales_and_shifts():
    block = stirred(tiny_base("llama")).network.networks["48x32"].blocks[0]
    z = torch.randn(5, 80).double()
    step = (z @ block.V.T @ block.U.T + block.bias).clamp(min=0)
    assert torch.allclose(block(z, 1), z + step * block.scale[1] + block.shift[1], atol=1e-12)


def test_settings_choose_projections_and_tokens():
    base = tiny_base("llama")
    down = tuple(base.layout.block(i).down for i in range(4))
    assert malmen(base).network.plan.modules == down
    assert malmen(base, layers=[-1]).network.plan.modules == down[-1:]
    assert malmen(base, layers=[1], projections="all").network.plan.modules == (
        *base.layout.block(1).projections,
    )
    counts = {}
    for tokens in ("answer", "all"):
        network = malmen(base, tokens=tokens).network
        (part,) = capture_parts(base, network, REQUESTS[:1], 4)
        counts[tokens] = len(part[down[0]].inputs)
    rows = rows_of(base, REQUESTS[:1])
    assert counts == {
        "answer": int(rows.answer_mask.sum()),
        "all": int(rows.attention_mask.sum()) - 1,
    }


@pytest.mark.parametrize("size", METRICS)
def test_few_keys_give_thin_factors_and_many_a_dense_edit(size):
    base = tiny_base("llama")  # d_in is 32 and 48
    method = stirred(base, tokens="all", projections="all", shift_size=size)
    few, many = method.edit(REQUESTS[:1]), method.edit(REQUESTS)
    assert isinstance(few, LowRankEdit)
    assert isinstance(many, DenseEdit)
    network = method.network
    with torch.no_grad():
        for edit, requests in ((few, REQUESTS[:1]), (many, REQUESTS)):
            (part,) = capture_parts(base, network, requests, 4)
            for name, factors in part.items():
                values = network.values(name, factors.inputs, factors.gradients)
                scales = network.ridge(name), network.metric(name)
                shift = dense(factors.inputs, values, *scales)
                assert torch.allclose(edit.deltas()[f"{name}.weight"], shift.T, atol=1e-10)


@pytest.mark.parametrize("kind", FAMILIES)
def test_minibatches_order_and_padding_change_no_edit(kind):
    base = tiny_base(kind)
    for tokens in ("answer", "all"):
        method = stirred(base, tokens=tokens)
        wanted = method.edit(REQUESTS).deltas()
        method.settings = replace(method.settings, at_once=1)
        base.padding_side = "left"
        found = method.edit(REQUESTS[::-1]).deltas()
        base.padding_side = "right"
        for name, delta in wanted.items():
            assert torch.allclose(delta, found[name], atol=1e-10)
            assert float(delta.abs().max()) > 1e-8


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_a_saved_edit_answers_as_the_first(tokens, tmp_path):
    base = tiny_base("gpt2")
    edit = stirred(base, tokens=tokens, projections=PROJECTIONS[tokens]).edit(REQUESTS)
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"), base)
    inputs = rows_of(base).inputs
    before = base.model(**inputs).logits
    with edit:
        first = base.model(**inputs).logits
    with again:
        assert torch.equal(base.model(**inputs).logits, first)
    assert torch.equal(base.model(**inputs).logits, before)
    assert not torch.equal(first, before)


def test_editing_leaves_the_statistics_alone():
    method = stirred(tiny_base("llama"))
    before = state(method)
    method.edit(REQUESTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(method).items())


def test_a_ridge_that_has_vanished_refuses_the_edit_and_names_the_layer():
    method = malmen(tiny_base("llama"), tokens="all")
    name = method.network.plan.modules[0]
    method.network.log_rates.data[0] = math.nan
    with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
        method.edit(REQUESTS)


# ---- the gradient of a training step


@pytest.mark.parametrize("size", METRICS)
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_cached_backward_pass_is_that_of_autograd(kind, tokens, at_once, size):  # MALMEN-6
    settings = {"tokens": tokens, "at_once": at_once, "own_wording": True, "shift_size": size}
    method = stirred(tiny_base(kind), projections=PROJECTIONS[tokens], **settings)
    examples = method.draw_episodes(EXAMPLES, 1)
    parts, shifts = write(method, examples)
    assert any(shift.keys is None for shift in shifts.values()) is (tokens == "all")
    outcome = cost(method, parts, shifts, [WeightedEpisodes(examples)])
    loss, expected = end_to_end(method, examples)
    assert torch.allclose(outcome.loss, loss, atol=1e-12)
    for found, wanted in zip(outcome.mean_gradients, expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-11)
        assert bool((found != 0).any())


def test_never_more_than_one_minibatch_runs_with_a_graph(monkeypatch):
    base = tiny_base("llama")
    sizes = []
    monkeypatch.setattr(
        shift_gradient,
        "outer_losses",
        lambda base, episodes, *deltas: (
            sizes.append(len(episodes)) or outer_losses(base, episodes, *deltas)
        ),
    )
    method = malmen(base, at_once=3)
    batch_gradient(method, EditBatch(EXAMPLES))
    assert sizes == [3, 1]


# ---- fit, checkpoints, ranks


def test_fit_learns_networks_rates_and_ridges_and_logs_how(tmp_path):
    method = MALMEN(tiny_base("gpt2"), **SMALL)
    start = state(malmen(method.base))
    fit(method, tmp_path)
    assert method.network.updates == 2
    moved = {n for n, tensor in state(method).items() if not torch.equal(tensor, start[n])}
    assert {"network.log_rates", "network.log_ridges"} <= moved
    assert "network.networks.128x32.normaliser.count" in moved
    metrics = method.trainer.callback_metrics
    first = method.network.plan.modules[0]
    assert {"train/loss", f"train/edit_lr/{first}", f"train/ridge/{first}"} <= metrics.keys()


def test_a_long_enough_fit_lowers_the_loss(tmp_path):
    settings = {**SMALL, "rank": 16, "lr": 1e-3, "lr_lr": 1e-1, "n_edits": 4}
    method = MALMEN(tiny_base("llama", torch.float32), **settings)
    fit(method, tmp_path)
    first = dict(method.trainer.callback_metrics)
    fit(method, tmp_path, max_epochs=25)
    for name in ("train/loss", "train/loss_edit"):
        assert float(method.trainer.callback_metrics[name]) < 0.8 * float(first[name])


@pytest.mark.parametrize("size", METRICS)
@pytest.mark.parametrize("how", ["load_from_checkpoint", "setting"])
def test_a_loaded_checkpoint_gives_the_same_edit(tmp_path, how, size):
    base = tiny_base("llama")
    method = MALMEN(base, **SMALL, tokens="all", projections="all", shift_size=size)
    fit(method, tmp_path).save_checkpoint(path := tmp_path / "fit.ckpt")
    if how == "load_from_checkpoint":
        again = MALMEN.load_from_checkpoint(path, base_model=base)
    else:
        again = MALMEN(base, checkpoint=str(path))
    edits = [m.edit(REQUESTS) for m in (method, again)]
    assert all(torch.equal(a, edits[1].deltas()[n]) for n, a in edits[0].deltas().items())
    assert len(edits[0].deltas()) == 12


@pytest.mark.parametrize("size", METRICS)
def test_a_resumed_fit_equals_an_unbroken_one_step_for_step(tmp_path, size):
    base = tiny_base("gpt2")
    # The last step of an epoch has one example.
    settings = {**SMALL, "n_edits": 3, "lr_end": 0.2, "shift_size": size}
    whole = MALMEN(base, **settings)
    fit(whole, tmp_path, max_epochs=2, callbacks=[SaveEachStep(tmp_path)])
    assert whole.network.updates == 4
    for stop in (1, 2, 3):
        rest = MALMEN(base, **settings)
        fit(rest, tmp_path, ckpt_path=tmp_path / f"{stop}.ckpt", max_epochs=2)
        wanted = state(whole)
        for name, tensor in state(rest).items():
            assert torch.equal(tensor, wanted[name]), (stop, name)


def test_a_step_that_is_not_finite_changes_no_parameter_and_is_counted(tmp_path, monkeypatch):
    method = malmen(tiny_base("llama"))
    before = [parameter.clone() for parameter in method.parameters()]
    monkeypatch.setattr(shift_gradient, "outer_losses", spoiled_losses)
    fit(method, tmp_path)
    assert method.trainer.callback_metrics["train/skipped_episodes"] == 2
    assert (method.network.skipped, method.network.updates) == (2, 1)
    assert all(bool(torch.isfinite(p).all()) for p in method.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def settings_of_ranks(ranks):
    """Eight examples in steps of six and of two, whatever the number of ranks."""
    return {**SMALL, "n_edits": 6 // ranks, "tokens": "all"}


@pytest.mark.slow
def test_two_ranks_end_equal_to_each_other_and_to_one_rank_on_all_the_data(tmp_path):
    check_ranks(tmp_path, "MALMEN", settings_of_ranks)
