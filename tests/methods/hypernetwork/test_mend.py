"""MEND: factors, statistics, networks, training, checkpoints, and the edits that come out."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from episode_support import EXAMPLES, batch_gradient, example, spoiled_losses
from fit_support import SaveEachStep, fit, fitted_by_ranks, state
from hypernetwork_support import SMALL, rows_of, weight_gradients
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from support import FAMILIES, REQUESTS, tiny_base
from torch.func import functional_call

from kedit_lightning import BaseModel, Edit, EditBatch, EditExample, EditRequest
from kedit_lightning.data import NanoFacts
from kedit_lightning.errors import (
    BaseModelMismatchError,
    CheckpointError,
    FactsNotWrittenWarning,
    MissingNeedsError,
    NonFiniteError,
    UnsupportedUseError,
)
from kedit_lightning.methods import MEND
from kedit_lightning.methods.hypernetwork.shared import meta_gradient
from kedit_lightning.methods.hypernetwork.shared.factor_statistics import RunningNormaliser
from kedit_lightning.methods.hypernetwork.shared.mend_network import MENDNetwork, MENDPlan
from kedit_lightning.methods.hypernetwork.shared.outer_loss import outer_losses
from kedit_lightning.methods.shared.gradient_factors import Factors, answer_loss, capture_factors
from kedit_lightning.methods.training.checkpoint import slim
from kedit_lightning.methods.training.episodes import (
    alternatives,
    make_episodes,
    rotate,
    with_another_target,
)


def mend(base, **settings):
    """An untrained MEND, built."""
    method = MEND(base, **{"checkpoint": "none", **SMALL, **settings})
    method.configure_model()
    return method


def stirred(base, **settings):
    """A MEND whose networks have seen data and are no longer the identity."""
    method = mend(base, **settings)
    batch_gradient(method, EditBatch(EXAMPLES))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.network.networks.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.01 * noise)
    return method


# ---- factors


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_factors_multiply_to_the_weight_gradients_of_several_layers(kind, side):  # MEND-1, MEND-6
    base = tiny_base(kind)
    names = [name for i in (1, 2, 3) for name in base.layout.block(i).projections]
    found = capture_factors(base, rows_of(base, side=side), names)
    for name, gradient in weight_gradients(base, rows_of(base), names).items():
        product = found[name].gradients.T @ found[name].inputs
        assert torch.allclose(product, gradient, rtol=0, atol=1e-12)
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_independent_and_padding_gives_nothing(side):  # MEND-7
    base = tiny_base("llama")
    names = base.layout.block(1).projections
    together = capture_factors(base, rows_of(base, side=side), names)
    for number, request in enumerate(REQUESTS):
        alone = capture_factors(base, rows_of(base, [request]), names)
        tokens = int(rows_of(base, [request]).attention_mask.sum())
        for name in names:
            own = together[name].of_rows(number, number + 1)
            assert torch.allclose(own.inputs, alone[name].inputs, atol=1e-12)
            assert torch.allclose(own.gradients, alone[name].gradients, atol=1e-12)
            assert set(own.rows.tolist()) == {0}
            assert len(own.rows) == tokens - 1  # the last token predicts nothing


def test_a_row_without_an_answer_has_no_factors():  # MEND-7
    base = tiny_base("gpt2")
    (name, *_) = base.layout.block(3).projections
    prompts = [r.prompt for r in REQUESTS[:2]]
    found = capture_factors(base, base.rows(prompts, ["Rome", None]), [name])[name]
    assert set(found.rows.tolist()) == {0}


def test_factors_of_a_half_precision_model_are_float32():
    base = tiny_base("llama", torch.bfloat16)
    (name, *_) = base.layout.block(3).projections
    found = capture_factors(base, rows_of(base), [name])[name]
    assert found.inputs.dtype == found.gradients.dtype == torch.float32


# ---- statistics


@pytest.mark.parametrize("sizes", [[40], [1, 7, 12, 20], [20, 0, 20]])
def test_running_statistics_equal_those_of_all_rows(sizes):  # MEND-5
    rows = 3 + 2 * torch.randn(40, 5, dtype=torch.float64)
    normaliser = RunningNormaliser(5, torch.float64)
    for part in rows.split(sizes):
        normaliser.update(part)
    assert normaliser.count == 40
    expected = (rows - rows.mean(0)) / (rows.std(0) + normaliser.EPSILON)
    assert torch.allclose(normaliser(rows), expected, atol=1e-12)


def test_rows_that_are_not_finite_stay_out_of_the_statistics():
    normaliser, clean = RunningNormaliser(3), RunningNormaliser(3)
    rows = torch.randn(6, 3)
    clean.update(rows)
    normaliser.update(torch.cat([rows, torch.tensor([[1.0, math.nan, 2.0], [math.inf, 0, 0]])]))
    assert all(
        torch.equal(a, b) for a, b in zip(normaliser.buffers(), clean.buffers(), strict=True)
    )


def test_statistics_keep_their_types_and_count_past_256_in_half_precision():
    network = (
        MENDNetwork(MENDPlan(("a",), rank=4), [(3, 2)], MEND().settings).to(torch.bfloat16).half()
    )
    normaliser = network.networks["3x2"].normaliser
    assert [b.dtype for b in normaliser.buffers()] == [torch.float32, torch.float32, torch.int64]
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    for _ in range(3):
        normaliser.update(torch.randn(100, 5, dtype=torch.bfloat16))
    assert normaliser.count == 300


def test_tokens_without_gradient_leave_the_statistics_alone():
    network = MENDNetwork(MENDPlan(("a",), rank=4), [(3, 2)], MEND().settings)
    network.update_statistics(
        [{"a": Factors(torch.randn(9, 3), torch.randn(9, 2), torch.zeros(9))}]
    )
    before = [buffer.clone() for buffer in network.buffers()]
    network.update_statistics(
        [{"a": Factors(torch.randn(9, 3), torch.zeros(9, 2), torch.zeros(9))}]
    )
    assert all(torch.equal(a, b) for a, b in zip(before, network.buffers(), strict=True))


# ---- networks


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_identity_without_normalisation_is_a_step_of_gradient_descent(kind):  # MEND-2
    base = tiny_base(kind)
    method = mend(base, normalise=False, edit_lr=0.01)
    edit = method.edit(REQUESTS)
    names = method.network.plan.modules
    gradients = weight_gradients(base, rows_of(base), names)
    deltas = edit.deltas()
    weights = {}
    for name in names:
        weight = base.module(name).weight
        step = -0.01 * gradients[name]
        step = step.T if step.shape != weight.shape else step
        assert torch.allclose(deltas[f"{name}.weight"], step, rtol=0, atol=1e-10)
        weights[f"{name}.weight"] = weight + step
    inputs = rows_of(base).inputs
    with edit:
        edited = base.model(**inputs).logits
    stepped = functional_call(base.model, weights, (), inputs).logits
    assert torch.allclose(edited, stepped, rtol=0, atol=1e-10)
    assert not torch.allclose(edited, base.model(**inputs).logits, atol=1e-4)


@pytest.mark.parametrize(("legacy", "lower"), [(False, True), (True, False)])
def test_the_edit_descends_unless_the_released_sign_is_asked_for(legacy, lower):  # MEND-3
    base = tiny_base("llama")
    rows = rows_of(base)
    before = float(answer_loss(base, rows).sum())
    with mend(base, normalise=False, legacy_sign=legacy).edit(REQUESTS):
        after = float(answer_loss(base, rows).sum())
    assert (after < before) is lower
    assert after != before


def test_training_turns_the_released_sign_within_two_steps(tmp_path):  # MEND-8
    base = tiny_base("llama")
    method = MEND(base, legacy_sign=True, accumulate=4, rank=4)
    fit(method, tmp_path, max_epochs=2)
    assert method.network.updates == 2
    assert bool((method.network.rates < 1e-10).all())


@pytest.mark.parametrize("shared", [True, False])
def test_networks_are_shared_by_shape_or_apart(shared):
    base = tiny_base("llama")
    network = mend(base, shared=shared).network
    assert len(network.plan.modules) == 9
    assert len(network.networks) == (2 if shared else 9)
    scales = {block.scale.shape[0] for net in network.networks.values() for block in net.blocks}
    assert scales == ({6, 3} if shared else {1})


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradients_equal_those_through_dense_weights(kind):  # MEND-4
    base = tiny_base(kind)
    method = stirred(base)
    network = method.network
    (episode,) = make_episodes(EXAMPLES[:1], locality=2)
    factors = capture_factors(base, rows_of(base, REQUESTS[:1]), network.plan.modules)
    one = torch.zeros(1, dtype=torch.long)
    deltas = network.deltas(base, REQUESTS[:1], factors, one)
    losses = outer_losses(base, [episode], *deltas)
    found = torch.autograd.grad((losses.edit + losses.locality).sum(), list(network.parameters()))

    weights = {}
    for name, delta in network.deltas(base, REQUESTS[:1], factors, one)[0].items():
        weight, dense = base.module(name).weight, delta.dense
        weights[f"{name}.weight"] = weight + (dense if dense.shape == weight.shape else dense.T)

    def token_log_probs(probe, edited):
        rows = base.rows([probe.prompt], [probe.answers[0] if probe.answers else None])
        logits = functional_call(base.model, weights if edited else {}, (), rows.inputs).logits
        return logits.log_softmax(-1)[0, rows.answer_columns[0]], rows.answer_ids[0]

    log_probs, ids = token_log_probs(episode.asked[0], edited=True)
    edit_loss = -log_probs.gather(-1, ids[:, None]).mean()
    kls = []
    for probe in episode.kept:
        after, before = (token_log_probs(probe, edited)[0] for edited in (True, False))
        kls.append((before.exp() * (before - after)).sum(-1))
    dense = edit_loss + torch.cat(kls).mean()
    assert torch.allclose(losses.edit[0], edit_loss, atol=1e-12)
    expected = torch.autograd.grad(dense, list(network.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


# ---- episodes and steps


def test_each_epoch_asks_the_next_probes():
    asked = [make_episodes(EXAMPLES, epoch=turn)[0].asked[0].prompt for turn in range(4)]
    assert asked[0] == asked[2] != asked[1] == asked[3]
    assert sorted(rotate("abc", 5, 0, "key")) == ["a", "b", "c"]
    pair, last = make_episodes(EXAMPLES[:3], size=2, rephrases=2, locality=9)
    assert pair.requests == tuple(REQUESTS[:2])
    assert (len(pair.asked), len(pair.kept), len(last.asked)) == (4, 4, 2)
    (both,) = make_episodes(EXAMPLES[:1], own_wording=True)
    assert [probe.kind for probe in both.asked] == ["rephrase", "rewrite"]
    assert both.asked[1].prompt == REQUESTS[0].prompt


def test_each_epoch_can_write_another_of_the_known_answers():
    facts = [
        EditRequest("The Louvre is in", "Rome", target_old="Paris", id="louvre"),
        EditRequest("The Pantheon is in", "Oslo", target_old="Paris", id="pantheon"),
        EditRequest("Bolt was founded by", "Marie Curie", target_old="Anna Weiss", id="bolt"),
    ]
    examples = [example(request) for request in facts]
    known = alternatives(examples)
    assert known == {"Paris": ["Oslo", "Rome"], "Anna Weiss": ["Marie Curie"]}
    drawn = [with_another_target(examples[0], known, turn, 0) for turn in range(2)]
    assert {e.requests[0].target_new for e in drawn} == {"Rome", "Oslo"}
    for changed in drawn:
        target = changed.requests[0].target_new
        assert {p.answers for p in changed.probes if p.kind != "locality"} == {(target,)}
        kept = [p for p in changed.probes if p.kind == "locality"]
        assert kept == [p for p in examples[0].probes if p.kind == "locality"]
    assert with_another_target(EXAMPLES[0], {}, 0, 0) is EXAMPLES[0]


def test_varied_targets_come_from_the_training_data(tmp_path):
    method = MEND(tiny_base("llama"), **SMALL, vary_targets=True)
    seen = []
    gradients = method.batch_gradients
    method.batch_gradients = lambda batch: seen.extend(method.episodes(batch)) or gradients(batch)
    fit(method, tmp_path, max_epochs=2)
    targets = {episode.requests[0].target_new for episode in seen if "Lyon" in str(episode)}
    assert targets == {"Norway", "Rome"}


def test_an_example_without_locality_probes_borrows_some():
    bare = replace(EXAMPLES[0], probes=EXAMPLES[0].probes[:3])
    first, second = make_episodes([bare, EXAMPLES[1]])
    assert {*first.kept, *second.kept} <= set(EXAMPLES[1].probes)
    assert len(first.kept) == len(second.kept) == 1
    base = tiny_base("llama")
    assert batch_gradient(mend(base), EditBatch([bare, EXAMPLES[1]])).scalars["loss_locality"] > 0
    assert batch_gradient(mend(base), EditBatch([bare])).scalars["loss_locality"] == 0


@pytest.mark.parametrize("family", ["gpt2", "opt"])  # opt flattens the rows of its MLPs
@pytest.mark.parametrize("settings", [{}, {"n_edits": 2}, {"n_locality": 2, "n_rephrases": 2}])
def test_episodes_together_equal_episodes_one_at_a_time(family, settings):
    base = tiny_base(family)
    together = batch_gradient(mend(base, **settings), EditBatch(EXAMPLES))
    alone = batch_gradient(mend(base, at_once=1, **settings), EditBatch(EXAMPLES))
    assert together.episodes == alone.episodes == (2 if "n_edits" in settings else 4)
    assert torch.allclose(together.sums, alone.sums, atol=1e-12)
    for a, b in zip(together.gradients, alone.gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert any(bool((gradient != 0).any()) for gradient in together.gradients)


def test_an_episode_that_is_not_finite_is_left_out_and_counted(tmp_path, monkeypatch):
    base = tiny_base("llama")
    monkeypatch.setattr(meta_gradient, "outer_losses", spoiled_losses)
    method = MEND(base, accumulate=4, rank=8)
    fit(method, tmp_path)
    assert method.trainer.callback_metrics["train/skipped_episodes"] == 1
    assert method.network.skipped == 1
    assert method.network.updates == 1
    assert all(bool(torch.isfinite(p).all()) for p in method.parameters())

    together, apart = (batch_gradient(mend(base, at_once=n), EditBatch(EXAMPLES)) for n in (4, 1))
    for found in (together, apart):
        assert (found.episodes, found.skipped) == (3, 1)
        assert bool(torch.isfinite(found.sums).all())
    for a, b in zip(together.gradients, apart.gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_step_with_no_finite_episode_changes_no_parameter(tmp_path, monkeypatch):
    method = mend(tiny_base("llama"), accumulate=4)
    before = [parameter.clone() for parameter in method.parameters()]
    inf = torch.tensor(math.inf)
    monkeypatch.setattr(
        meta_gradient,
        "outer_losses",
        lambda *a: type(losses := outer_losses(*a))(losses.edit * inf, losses.edit, losses.success),
    )
    fit(method, tmp_path)
    assert method.network.skipped == 4
    assert method.network.updates == 0
    assert all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def test_data_without_rephrases_or_locality_is_refused_by_name():
    method = mend(tiny_base("llama"))
    bare = EditExample.from_request(REQUESTS[0], "bare")
    with pytest.raises(MissingNeedsError, match=r"'bare' lacks 'rephrases'"):
        method.check_examples([*EXAMPLES, bare], fitting=True)
    kept_out = [replace(e, probes=e.probes[:3]) for e in EXAMPLES]
    with pytest.raises(MissingNeedsError, match=r"'tower' lacks 'locality'"):
        method.check_examples(kept_out, fitting=True)
    method.check_examples([*EXAMPLES, *kept_out], fitting=True)
    method.check_examples([bare])


# ---- edits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_editing_changes_neither_model_nor_statistics_and_rolls_back_exactly(dtype):
    base = tiny_base("llama", dtype)
    method = stirred(base, edit_lr=0.1)
    before, inputs = state(method), rows_of(base).inputs
    logits = base.model(**inputs).logits
    edit = method.edit(REQUESTS)
    assert torch.equal(base.model(**inputs).logits, logits)
    with edit:
        assert not torch.equal(base.model(**inputs).logits, logits)
    assert torch.equal(base.model(**inputs).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(method).items())


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_batch_is_the_sum_of_its_single_edits_in_any_order_and_padding(kind):
    base = tiny_base(kind)
    method = stirred(base)
    total = method.edit(REQUESTS).deltas()
    singles = [method.edit([request]).deltas() for request in REQUESTS]
    base.padding_side = "left"
    turned = method.edit(REQUESTS[::-1]).deltas()
    for name, delta in total.items():
        assert torch.allclose(delta, sum(single[name] for single in singles), atol=1e-12)
        assert torch.allclose(delta, turned[name], atol=1e-12)
        assert float(delta.abs().max()) > 1e-8


def test_an_edit_is_computed_on_top_of_the_stack():
    base = tiny_base("llama")
    method = stirred(base, edit_lr=0.05)
    alone = method.edit(REQUESTS[:1]).deltas()
    with method.edit(REQUESTS[1:]):
        after = method.edit(REQUESTS[:1])
        assert len(after.origin.stack) == 1
    assert any(not torch.allclose(alone[n], d, atol=1e-8) for n, d in after.deltas().items())


def test_a_saved_edit_answers_as_the_first(tmp_path):
    base = tiny_base("gpt2")
    edit = stirred(base, edit_lr=0.05).edit(REQUESTS)
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"), base)
    inputs = rows_of(base).inputs
    with edit:
        first = base.model(**inputs).logits
    with again:
        assert torch.equal(base.model(**inputs).logits, first)


def test_nan_in_a_gradient_refuses_the_edit_and_names_the_layer():
    base = tiny_base("llama")
    method = mend(base)
    name = method.network.plan.modules[0]
    method.network.rates.data[0] = math.nan
    with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
        method.edit(REQUESTS)


def test_settings_choose_the_projections():
    base = tiny_base("llama")
    down = base.layout.block(0).down
    assert mend(base, modules=[down]).network.plan.modules == (down,)
    first = mend(base, layers=[0, -1]).network.plan.modules
    assert first == base.layout.block(0).projections + base.layout.block(3).projections
    assert len(mend(tiny_base("gpt2")).network.plan.modules) == 6
    with pytest.raises(UnsupportedUseError, match="lm_head"):
        mend(tiny_base("gpt2"), modules=["lm_head"])


def test_editing_with_untrained_networks_warns_and_says_how_to_fit():
    base = tiny_base("llama")
    with pytest.warns(UserWarning, match="kedit fit -c methods/mend"):
        MEND(base, rank=4).edit(REQUESTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FactsNotWrittenWarning)
        MEND(base, rank=4, checkpoint="none").edit(REQUESTS)


def test_the_packaged_checkpoint_is_used_where_it_fits_and_settings_agree():
    base = BaseModel.load("nano")
    method = MEND(base)
    edit = method.edit([EditRequest("The capital of France is", "Lyon")])
    assert edit.origin.notes["updates"] > 100
    assert edit.origin.notes["learned_from"] == "the checkpoint packaged with the base model"
    with pytest.warns(UserWarning, match="has not been fitted"):
        other = MEND(base, rank=7, layers=[0]).edit(REQUESTS[:1])
    assert other.origin.notes.items() >= {"learned_from": "nothing", "updates": 0}.items()
    untrained = MEND(base, checkpoint="none")
    untrained.configure_model()
    assert untrained.network.updates == 0
    fitting = MEND(base)
    fitting._trainer = type("Trainer", (), {"state": TrainerState(fn=TrainerFn.FITTING)})()
    fitting.configure_model()
    assert fitting.network.updates == 0


def test_the_packaged_checkpoint_edits_facts_it_was_not_fitted_on():
    base = BaseModel.load("nano")
    method = MEND(base)
    examples = NanoFacts(limit=20).examples("validation")
    right = []
    for item in examples:
        (probe,) = [probe for probe in item.probes if probe.kind == "rewrite"]
        rows = base.rows([probe.prompt], [probe.answers[0]])
        with method.edit(item.requests):
            right.append(torch.equal(base.answer_logits(rows).argmax(-1), rows.answer_ids))
        assert not torch.equal(base.answer_logits(rows).argmax(-1), rows.answer_ids)
    assert sum(right) >= 0.8 * len(examples)


# ---- fit, checkpoints, resume


def fitted(tmp_path, base, **settings):
    method = MEND(base, **{**SMALL, **settings})
    trainer = fit(method, tmp_path)
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    return method, tmp_path / "fit.ckpt"


def test_fit_learns_the_networks_alone_and_logs_how(tmp_path):
    base = tiny_base("gpt2")
    start = state(mend(base))
    method, path = fitted(tmp_path, base)
    assert method.network.updates == 2
    moved = {n for n, tensor in state(method).items() if not torch.equal(tensor, start[n])}
    assert any(name.endswith("U") for name in moved)
    assert {"network.rates", "network.networks.32x128.normaliser.count"} <= moved
    metrics = method.trainer.callback_metrics
    names = ("loss", "loss_edit", "loss_locality", "edit_success", "gradient_norm")
    assert all(f"train/{name}" in metrics for name in names)
    assert f"train/edit_lr/{method.network.plan.modules[0]}" in metrics

    checkpoint = torch.load(path, weights_only=True)
    assert all(name.startswith("network.") for name in checkpoint["state_dict"])
    assert len(checkpoint["state_dict"]) == len(start)
    assert "base_model" not in checkpoint["hyper_parameters"]
    assert checkpoint["base_model"]["fingerprint"] == base.fingerprint


def test_a_long_enough_fit_lowers_the_loss(tmp_path):
    base = tiny_base("llama", torch.float32)
    method = MEND(base, rank=16, lr=1e-3, lr_lr=1e-2, edit_lr=1e-3, c_edit=1.0, accumulate=4)
    fit(method, tmp_path, max_epochs=1)
    first = dict(method.trainer.callback_metrics)
    fit(method, tmp_path, max_epochs=15)
    for name in ("train/loss", "train/loss_edit"):
        assert float(method.trainer.callback_metrics[name]) < 0.8 * float(first[name])


@pytest.mark.parametrize("how", ["load_from_checkpoint", "setting", "slim"])
def test_a_loaded_checkpoint_gives_the_same_edit(tmp_path, how):
    base = tiny_base("llama")
    method, path = fitted(tmp_path, base)
    if how == "slim":
        small = tmp_path / "small.ckpt"
        torch.save(slim(torch.load(path, weights_only=True)), small)
        assert small.stat().st_size < path.stat().st_size / 2
        path = small
    if how == "load_from_checkpoint":
        again = MEND.load_from_checkpoint(path, base_model=base)
    else:
        again = MEND(base, checkpoint=str(path))
    edits = [m.edit(REQUESTS) for m in (method, again)]
    assert all(torch.equal(a, edits[1].deltas()[n]) for n, a in edits[0].deltas().items())
    assert edits[1].origin.notes["updates"] == 2


def test_learning_rates_fall_to_the_share_asked_for(tmp_path):
    method = MEND(tiny_base("llama"), **{**SMALL, "lr_end": 0.25})
    trainer = fit(method, tmp_path, max_epochs=2)
    groups = trainer.optimizers[0].param_groups
    # the fourth and last step begins when three quarters of the way are done
    expected = (1 - 0.75 * 0.75) * 1e-4
    assert [group["lr"] for group in groups] == pytest.approx([expected, expected])
    with pytest.raises(UnsupportedUseError, match="max_epochs"):
        fit(MEND(tiny_base("llama"), lr_end=0.5), tmp_path, max_epochs=-1, max_steps=-1)


def test_a_resumed_fit_equals_an_unbroken_one_step_for_step(tmp_path):
    base = tiny_base("gpt2")
    settings = {**SMALL, "lr_end": 0.2}
    whole = MEND(base, **settings)
    fit(whole, tmp_path, max_epochs=2, callbacks=[SaveEachStep(tmp_path)])
    assert whole.network.updates == 4
    wanted, loss = state(whole), batch_gradient(whole, EditBatch(EXAMPLES)).loss
    for stop in (1, 2, 3):
        rest = MEND(base, **settings)
        fit(rest, tmp_path, ckpt_path=tmp_path / f"{stop}.ckpt", max_epochs=2)
        for name, tensor in state(rest).items():
            assert torch.equal(tensor, wanted[name]), (stop, name)
        assert torch.equal(batch_gradient(rest, EditBatch(EXAMPLES)).loss, loss)


def test_a_checkpoint_of_another_shape_wins_over_the_settings_it_was_built_with(tmp_path):
    base = tiny_base("llama")
    _, path = fitted(tmp_path, base, rank=3, layers=[1])
    other = mend(base)
    other.on_load_checkpoint(torch.load(path, weights_only=True))
    assert other.network.plan.rank == 3
    assert other.network.plan.modules == base.layout.block(1).projections


def test_a_named_checkpoint_that_does_not_fit_is_refused(tmp_path):
    base = tiny_base("llama")
    _, path = fitted(tmp_path, base)
    with pytest.raises(UnsupportedUseError, match="rank 8, not 5"):
        MEND(base, checkpoint=str(path), rank=5).configure_model()
    with pytest.raises(CheckpointError, match="does not exist"):
        MEND(base, checkpoint=str(tmp_path / "absent.ckpt")).configure_model()
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"text\.ckpt"):
        MEND(base, checkpoint=str(tmp_path / "text.ckpt")).configure_model()
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["plan"]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="holds no learned network"):
        MEND(base, checkpoint=str(tmp_path / "other.ckpt")).configure_model()
    wider = tiny_base("llama", intermediate_size=40)
    with (
        pytest.warns(UserWarning, match="fingerprint"),
        pytest.raises(BaseModelMismatchError, match="other shapes"),
    ):
        MEND(wider, checkpoint=str(path)).configure_model()


def test_half_precision_plugins_leave_networks_and_statistics_whole(tmp_path):
    base = tiny_base("llama", torch.float32)
    method = MEND(base, **SMALL)
    fit(method, tmp_path, precision="bf16-true")
    assert method.network.updates == 2
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    plain = MEND(base, **SMALL)
    fit(plain, tmp_path)
    wanted = state(plain)
    assert all(torch.allclose(t, wanted[n], atol=1e-4) for n, t in state(method).items())


def test_a_precision_that_needs_scaled_losses_is_refused(tmp_path):
    method = mend(tiny_base("llama"))
    method._trainer = type(
        "Trainer", (), {"precision": "16-mixed", "max_steps": -1, "max_epochs": 1}
    )()
    with pytest.raises(UnsupportedUseError, match="bf16-mixed"):
        method.on_fit_start()


@pytest.mark.slow
def test_two_ranks_end_equal_to_each_other_and_to_one_rank_on_all_the_data(tmp_path):
    one, first, second = fitted_by_ranks(
        tmp_path, "MEND", lambda ranks: {**SMALL, "accumulate": 4 // ranks}
    )
    assert first["network.updates"] == 2
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], tensor, rtol=1e-9, atol=1e-12), name
