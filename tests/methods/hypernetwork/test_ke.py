"""KE: gates, the bound on divergence, conditions, training, checkpoints, and the edits."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from episode_support import EXAMPLES, batch_gradient, data
from fit_support import SaveEachStep, fit, state
from hypernetwork_support import rows_of, weight_gradients
from places import TESTS
from support import FAMILIES, REQUESTS, tiny_base
from torch.func import functional_call

from kedit_lightning import EditBatch, EditRequest
from kedit_lightning.errors import CheckpointError
from kedit_lightning.methods import KE, MEND
from kedit_lightning.methods.hypernetwork.ke.divergence_bound import DivergenceBound
from kedit_lightning.methods.hypernetwork.ke.gates import Gates, gated_delta
from kedit_lightning.methods.hypernetwork.ke.knowledge_editor import condition_texts, embedded
from kedit_lightning.methods.hypernetwork.shared import meta_gradient
from kedit_lightning.methods.hypernetwork.shared.outer_loss import outer_losses
from kedit_lightning.methods.shared.gradient_factors import Factors, capture_factors
from kedit_lightning.methods.training.episodes import make_episodes

SMALL = {"hidden": 8, "condition": 16, "accumulate": 2, "lr": 1e-3, "max_scale": 4.0}
ONE = torch.zeros(1, dtype=torch.long)


def ke(base, **settings):
    """An untrained KE, built."""
    method = KE(base, **{"checkpoint": "none", **SMALL, **settings})
    method.configure_model()
    return method


def dense(method, request):
    """The edit of each weight by the formula, ``[d_out, d_in]``, from the full gradient."""
    base, network = method.base, method.network
    gates = network.gates(*embedded(base, condition_texts(base, [request])))
    gradients = weight_gradients(base, rows_of(base, [request]), network.plan.modules)
    edits = {}
    for name, gate in gates.items():
        a = torch.outer(gate.out[0], gate.into[0])
        b = torch.outer(gate.added_out[0], gate.added_into[0])
        edits[name] = gate.strength[0] * (gradients[name] * a + b)
    return edits


def written(base, edits):
    """Weights of the base model with edits ``[d_out, d_in]`` added, by parameter name."""
    weights = {}
    for name, delta in edits.items():
        weight = base.module(name).weight
        turn = type(base.module(name)).__name__ == "Conv1D"
        weights[f"{name}.weight"] = weight + (delta.T if turn else delta)
    return weights


# ---- gates


def random_gates(d_in=5, d_out=3, requests=2, eta=None, scale=2.0):
    values = torch.randn(requests, 2 * (d_in + d_out) + 1, dtype=torch.float64)
    if eta is not None:
        values[:, -1] = eta
    return Gates.from_values(values, d_in, d_out, scale)


def random_factors(d_in=5, d_out=3):
    rows = torch.tensor([0, 0, 1, 0, 1])
    inputs, gradients = (torch.randn(5, width, dtype=torch.float64) for width in (d_in, d_out))
    return Factors(inputs, gradients, rows)


def test_factors_multiply_to_the_gated_gradient():
    factors, gates = random_factors(), random_gates()
    delta, edit_of_term = gated_delta(factors, gates, torch.tensor([0, 1]))
    for number in range(2):
        own = factors.of_rows(number, number + 1)
        gradient = own.gradients.T @ own.inputs
        a = torch.outer(gates.out[number], gates.into[number])
        b = torch.outer(gates.added_out[number], gates.added_into[number])
        mine = edit_of_term == number
        assert torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == 1  # KE-1
        product = delta.b[:, mine] @ delta.a[mine]
        assert torch.allclose(product, gates.strength[number] * (gradient * a + b), atol=1e-14)


def test_gates_share_outputs_out_and_have_a_largest_strength():
    gates = random_gates(scale=2.0)
    for share in (gates.out, gates.added_out):
        assert torch.allclose(share.sum(-1), torch.ones(2, dtype=torch.float64))
        assert bool((share > 0).all())
    assert bool(((gates.strength > 0) & (gates.strength < 2)).all())
    assert torch.allclose(
        random_gates(eta=math.inf, scale=2.0).strength, torch.tensor(2.0).double()
    )


def test_a_closed_gate_changes_nothing():  # KE-1
    delta, _ = gated_delta(random_factors(), random_gates(eta=-math.inf), torch.tensor([0, 1]))
    assert not bool(delta.b.any())
    assert bool(torch.isfinite(delta.a).all())


@pytest.mark.parametrize("kind", FAMILIES)
def test_open_gates_are_a_step_of_gradient_descent(kind):
    base = tiny_base(kind)
    names = base.layout.block(2).projections
    factors = capture_factors(base, rows_of(base, REQUESTS[:1]), names)
    gradients = weight_gradients(base, rows_of(base, REQUESTS[:1]), names)
    for name, own in factors.items():
        ones = [torch.ones(1, x.shape[1]).to(x) for x in (own.gradients, own.inputs)]
        gates = Gates(*ones, ones[0], 0 * ones[1], own.inputs.new_full((1,), -0.01))
        delta, _ = gated_delta(own, gates, ONE)
        assert torch.allclose(delta.dense, -0.01 * gradients[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_edit_is_the_gated_gradient_written_into_the_weights(kind):
    base = tiny_base(kind)
    method = ke(base)
    edit = method.edit(REQUESTS[:1])
    deltas, wanted = edit.deltas(), written(base, dense(method, REQUESTS[0]))
    inputs = rows_of(base).inputs
    for name, weight in wanted.items():
        delta = weight - base.model.get_parameter(name)
        assert torch.allclose(deltas[name], delta, rtol=0, atol=1e-12)
    with edit:
        edited = base.model(**inputs).logits
    stepped = functional_call(base.model, wanted, (), inputs).logits
    assert torch.allclose(edited, stepped, rtol=0, atol=1e-10)
    assert not torch.allclose(edited, base.model(**inputs).logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradients_equal_those_through_dense_weights(kind):
    base = tiny_base(kind)
    method = ke(base)
    network, parameters = method.network, list(method.network.parameters())
    (episode,) = make_episodes(EXAMPLES[:1], locality=2)
    factors = capture_factors(base, rows_of(base, REQUESTS[:1]), network.plan.modules)
    losses = outer_losses(base, [episode], *network.deltas(base, REQUESTS[:1], factors, ONE))
    found = torch.autograd.grad((losses.edit + losses.locality).sum(), parameters)

    weights = written(base, dense(method, REQUESTS[0]))

    def log_probs(probe, edited):
        rows = base.rows([probe.prompt], [probe.answers[0] if probe.answers else None])
        logits = functional_call(base.model, weights if edited else {}, (), rows.inputs).logits
        return logits.log_softmax(-1)[0, rows.answer_columns[0]], rows.answer_ids[0]

    after, ids = log_probs(episode.asked[0], True)
    loss = -after.gather(-1, ids[:, None]).mean()
    pairs = [[log_probs(probe, edited)[0] for edited in (False, True)] for probe in episode.kept]
    loss = loss + torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean()
    for a, b in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)
        assert bool(a.any())


# ---- the bound


def test_the_multiplier_grows_while_answers_diverge_by_more_than_the_margin():
    bound = DivergenceBound(0.5, torch.float64)
    assert bound.multiplier == 1
    bound.ascend(torch.tensor(0.75), lr=0.2)
    assert torch.isclose(bound.multiplier, torch.tensor(1.05).double())
    bound.ascend(torch.tensor(0.25), lr=0.2)
    assert torch.isclose(bound.multiplier, torch.tensor(1.0).double())
    for _ in range(30):
        bound.ascend(torch.tensor(0.0), lr=0.2)
        assert bound.multiplier >= 0
    assert bound.multiplier == 0
    bound.ascend(torch.tensor(1.5), lr=0.2)
    assert torch.isclose(bound.multiplier, torch.tensor(0.2).double())
    assert bound.margin == 0.5


def test_the_margin_follows_the_success_of_validations_alone():
    bound = DivergenceBound(0.5, torch.float64)
    bound.tighten(0.9, floor=0.1)
    bound.ascend(torch.tensor(7.0), lr=0.2)
    assert bound.margin == 0.5
    margins = []
    for _ in range(9):
        bound.tighten(0.91, floor=0.1)
        margins.append(float(bound.margin))
    assert margins[:3] == pytest.approx([0.4, 0.32, 0.256])
    assert margins[-2:] == [0.1, 0.1]
    below = DivergenceBound(0.05)
    below.tighten(1.0, floor=0.1)
    assert float(below.margin) == pytest.approx(0.05)


# ---- conditions


def test_a_condition_names_the_old_answer_the_new_one_and_the_prompt():
    base = tiny_base("llama")
    unknown = EditRequest("Lyon is in", "Peru")
    said = base.generate([unknown.prompt], 8, stop_at_sentence=True)[0]
    texts = condition_texts(base, [REQUESTS[0], unknown, REQUESTS[1]])
    assert texts[0] == "Paris >> Rome || The Eiffel Tower is in the city of"
    assert texts[2].startswith("Warsaw >> Berlin || Marie Curie")
    old, rest = texts[1].split(" >> ")
    assert rest == "Peru || Lyon is in"
    assert old.strip()
    assert old.strip() in said


def test_the_old_answer_is_what_the_edited_model_says():
    base = tiny_base("llama")
    request = EditRequest("Lyon is in", "Peru")
    before = condition_texts(base, [request])
    with ke(base, max_scale=400.0).edit(REQUESTS[:1]):
        assert condition_texts(base, [request]) != before


def test_conditions_do_not_depend_on_the_others_or_on_padding():
    base = tiny_base("gpt2")
    network = ke(base).network
    texts = condition_texts(base, REQUESTS)
    together = network.gates(*embedded(base, texts))
    base.padding_side = "left"
    for number, text in enumerate(texts):
        alone = network.gates(*embedded(base, [text]))
        for name, gates in together.items():
            for one, own in zip(vars(gates).values(), vars(alone[name]).values(), strict=True):
                assert torch.allclose(one[number], own[0], atol=1e-14)
    apart = [gates.into for gates in together.values()]
    assert all(not torch.allclose(into[0], into[1], atol=1e-4) for into in apart)


# ---- edits


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_batch_is_the_sum_of_its_single_edits_in_any_order(kind):
    base = tiny_base(kind)
    method = ke(base)
    total = method.edit(REQUESTS).deltas()
    singles = [method.edit([request]).deltas() for request in REQUESTS]
    turned = method.edit(REQUESTS[::-1]).deltas()
    for name, delta in total.items():
        assert torch.allclose(delta, sum(single[name] for single in singles), atol=1e-12)
        assert torch.allclose(delta, turned[name], atol=1e-12)
        assert float(delta.abs().max()) > 1e-8


@pytest.mark.parametrize("settings", [{}, {"n_edits": 2}])
def test_episodes_together_equal_episodes_one_at_a_time(settings):
    base = tiny_base("opt")
    together = batch_gradient(ke(base, **settings), EditBatch(EXAMPLES))
    alone = batch_gradient(ke(base, at_once=1, **settings), EditBatch(EXAMPLES))
    assert together.episodes == alone.episodes
    assert torch.allclose(together.sums, alone.sums, atol=1e-12)
    for a, b in zip(together.gradients, alone.gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


# ---- fit, checkpoints, resume


def test_fit_learns_the_networks_and_leaves_the_base_model_alone(tmp_path):
    base = tiny_base("gpt2")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    start = state(ke(base))
    method = KE(base, **SMALL)
    trainer = fit(method, tmp_path)
    assert method.network.updates == 2
    moved = {n for n, tensor in state(method).items() if not torch.equal(tensor, start[n])}
    assert {n for n in start if "margin" not in n and "skipped" not in n} == moved
    metrics = trainer.callback_metrics
    assert {"train/loss_locality", "train/multiplier", "train/margin"} <= metrics.keys()
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    storages = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    assert not any(t.untyped_storage().data_ptr() in storages for t in method.state_dict().values())


def test_a_long_enough_fit_lowers_the_loss(tmp_path):
    base = tiny_base("llama", torch.float32)
    method = KE(base, **{**SMALL, "hidden": 32, "lr": 3e-3, "accumulate": 4, "margin": 1.0})
    fit(method, tmp_path, max_epochs=1)
    first = float(method.trainer.callback_metrics["train/loss_edit"])
    fit(method, tmp_path, max_epochs=25)
    assert float(method.trainer.callback_metrics["train/loss_edit"]) < 0.8 * first


@pytest.mark.parametrize("margin", [0.0, 1e6])
def test_a_step_moves_the_multiplier_by_the_divergence_of_its_episodes(tmp_path, margin):
    method = KE(tiny_base("llama"), **SMALL, margin=margin, lr_multiplier=1e-7)
    fit(method, tmp_path, max_epochs=1, max_steps=1)
    step = float(method.network.bound.multiplier) - 1
    found = float(method.trainer.callback_metrics["train/loss_locality"])
    assert step == pytest.approx(1e-7 * (found - margin), rel=1e-6)
    assert (step > 0) is (margin == 0)


def with_validation(tmp_path):
    """Data whose validation split is its training split."""
    module = data(tmp_path)
    module.val_path = module.train_path
    return module


@pytest.mark.parametrize(("success", "margin"), [(-1.0, 0.8e-3), (1.0, 1e-3)])
def test_a_validation_that_succeeds_tightens_the_margin(tmp_path, monkeypatch, success, margin):
    monkeypatch.setattr(DivergenceBound, "SUCCESS", success)
    method = KE(tiny_base("llama"), **SMALL)
    fit(method, tmp_path, source=with_validation(tmp_path), num_sanity_val_steps=1)
    assert float(method.network.bound.margin) == pytest.approx(margin)
    method.trainer.validate(method, with_validation(tmp_path), verbose=False)
    assert float(method.network.bound.margin) == pytest.approx(margin)


class SaveEachStepAndValidation(SaveEachStep):
    """What is saved at the end of an epoch has seen its validation, as with ModelCheckpoint."""

    def on_validation_end(self, trainer, *args):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_a_resumed_fit_equals_an_unbroken_one_step_for_step(tmp_path, monkeypatch):
    monkeypatch.setattr(DivergenceBound, "SUCCESS", -1.0)
    base, source = tiny_base("gpt2"), with_validation(tmp_path)
    settings = {**SMALL, "lr_end": 0.2}
    whole = KE(base, **settings)
    fit(
        whole,
        tmp_path,
        max_epochs=2,
        source=source,
        callbacks=[SaveEachStepAndValidation(tmp_path)],
    )
    assert whole.network.updates == 4
    assert float(whole.network.bound.margin) == pytest.approx(0.64e-3)
    wanted, loss = state(whole), batch_gradient(whole, EditBatch(EXAMPLES)).loss
    for stop in (1, 2, 3):
        rest = KE(base, **settings)
        fit(rest, tmp_path, tmp_path / f"{stop}.ckpt", max_epochs=2, source=source)
        for name, tensor in state(rest).items():
            assert torch.equal(tensor, wanted[name]), (stop, name)
        assert torch.equal(batch_gradient(rest, EditBatch(EXAMPLES)).loss, loss)


def test_a_loaded_checkpoint_gives_the_same_edit_and_is_refused_by_others(tmp_path):
    base = tiny_base("llama")
    method = KE(base, **SMALL)
    fit(method, tmp_path).save_checkpoint(tmp_path / "ke.ckpt")
    again = KE(base, checkpoint=str(tmp_path / "ke.ckpt"))
    edits = [m.edit(REQUESTS) for m in (method, again)]
    assert all(torch.equal(a, edits[1].deltas()[n]) for n, a in edits[0].deltas().items())
    assert again.network.plan.hidden == 8
    with pytest.raises(CheckpointError, match="KE, not MEND"):
        MEND(base, checkpoint=str(tmp_path / "ke.ckpt")).configure_model()


def test_an_episode_that_is_not_finite_is_left_out_and_counted(tmp_path, monkeypatch):
    base, bad = tiny_base("llama"), REQUESTS[1].target_new

    def spoil(base, episodes, *deltas):
        losses = outer_losses(base, episodes, *deltas)
        spoiled = [math.nan if e.requests[0].target_new == bad else 1.0 for e in episodes]
        factor = torch.tensor(spoiled, dtype=torch.float64)
        return replace(losses, locality=losses.locality * factor)

    monkeypatch.setattr(meta_gradient, "outer_losses", spoil)
    method = KE(base, **{**SMALL, "accumulate": 4})
    fit(method, tmp_path)
    assert method.trainer.callback_metrics["train/skipped_episodes"] == 1
    assert (method.network.skipped, method.network.updates) == (1, 1)
    assert all(bool(torch.isfinite(t).all()) for t in method.state_dict().values())


RANK_SCRIPT = """
import sys
from pathlib import Path
import lightning.pytorch as pl, torch
sys.path[:0] = [{tests!r}, {here!r}]
from kedit_lightning.data.dataloader import BatchLoader, process_rank
from test_ke import EXAMPLES, KE, SMALL, EditBatch, replace, tiny_base
from test_instructedit import InstructEdit, WORDS

torch.set_num_threads(1)
ranks, folder = int(sys.argv[1]), Path(sys.argv[2])
five = [*EXAMPLES, replace(EXAMPLES[0], id="again")]
# The ranks hold other examples, and not equally many.
shares = [[[0, 1], [2]], [[3], [4, 0]]] if ranks > 1 else [[[0, 1, 3], [2, 4, 0]]]

class Shares(pl.LightningDataModule):
    def train_dataloader(self):
        own = [EditBatch([five[i] for i in batch]) for batch in shares[process_rank()[0]]]
        return BatchLoader(lambda epoch: own, len(own), {{}})

method = {make}
trainer = pl.Trainer(
    max_epochs=2, accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto",
    logger=False, enable_progress_bar=False, enable_model_summary=False,
    enable_checkpointing=False, default_root_dir=folder, use_distributed_sampler=False,
)
trainer.fit(method, Shares())
torch.save(method.state_dict(), folder / f"{{ranks}}-{{trainer.global_rank}}.pt")
"""


def states_of_ranks(make, folder):
    """What one rank on all the data ends with, and each of two ranks on unequal shares of it."""
    script = folder / "script.py"
    script.write_text(
        RANK_SCRIPT.format(tests=str(TESTS), here=str(Path(__file__).parent), make=make)
    )
    for ranks in (1, 2):
        command = [sys.executable, str(script), str(ranks), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
        assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    ['KE(tiny_base("gpt2"), **SMALL)', 'InstructEdit(tiny_base("gpt2"), **WORDS)'],
    ids=["KE", "InstructEdit"],
)
def test_two_ranks_end_equal_to_each_other_and_to_one_rank_on_all_the_data(make, tmp_path):
    one, first, second = states_of_ranks(make, tmp_path)
    assert first["network.updates"] == 4
    assert first.get("network.bound.multiplier") != 1
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], tensor, rtol=1e-9, atol=1e-12), name
