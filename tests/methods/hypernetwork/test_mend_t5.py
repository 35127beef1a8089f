"""MEND on a model with an encoder and a decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from episode_support import EXAMPLES, batch_gradient, data
from support import REQUESTS, tiny_base
from torch.func import functional_call

from kedit_lightning import Edit, EditBatch, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.methods import MEND
from kedit_lightning.methods.shared.gradient_factors import answer_loss, capture_factors

SMALL = {"rank": 8, "lr": 1e-3, "edit_lr": 1e-3, "accumulate": 2, "checkpoint": "none"}


def built(**settings):
    method = MEND(tiny_base("t5"), **{**SMALL, **settings})
    method.configure_model()
    return method


def rows_of(base):
    return base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])


def test_the_last_two_blocks_of_each_half_are_edited():
    names = built().network.plan.modules
    assert names == (
        *(f"encoder.block.{i}.layer.1.DenseReluDense.{p}" for i in (1, 2) for p in ("wi", "wo")),
        *(f"decoder.block.{i}.layer.2.DenseReluDense.{p}" for i in (1, 2) for p in ("wi", "wo")),
    )
    named = built(layers=[-1]).network.plan.modules
    assert [name.split(".")[:3] for name in named[::2]] == [
        ["encoder", "block", "2"],
        ["decoder", "block", "2"],
    ]


def test_factors_of_both_halves_multiply_to_the_weight_gradients():
    method = built()
    base, names = method.base, method.network.plan.modules
    rows = rows_of(base)
    found = capture_factors(base, rows, names)
    weights = [base.module(name).weight for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(answer_loss(base, rows).sum(), weights)
    for weight in weights:
        weight.requires_grad_(False)
    for name, gradient in zip(names, gradients, strict=True):
        product = found[name].gradients.T @ found[name].inputs
        assert torch.allclose(product, gradient, rtol=0, atol=1e-12), name
        assert bool((gradient != 0).any())


def test_an_edit_is_a_dense_change_of_the_weights_and_leaves_nothing_behind(tmp_path: Path):
    method = built(edit_lr=0.05)
    batch_gradient(method, EditBatch(EXAMPLES))  # the normalisers have seen data
    base, inputs = method.base, rows_of(method.base).inputs
    before = base.model(**inputs).logits
    edit = method.edit(REQUESTS)
    assert len(edit.deltas()) == 8
    changed = {name: base.model.get_parameter(name) + d for name, d in edit.deltas().items()}
    dense = functional_call(base.model, changed, (), inputs).logits
    with edit:
        after = base.model(**inputs).logits
    assert torch.allclose(after, dense, rtol=0, atol=1e-10)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(base.model(**inputs).logits, before)
    edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors", base):
        assert torch.equal(base.model(**inputs).logits, after)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_rows_with_edits_of_their_own_are_answered_as_one_at_a_time(options):
    method = built(edit_lr=0.5)
    base, prompts = method.base, [request.prompt for request in REQUESTS]
    plain = base.generate(prompts, 6, **options)
    edits = [method.edit([request]) for request in REQUESTS]
    with base.edits.carried([*edits[:3], None]):
        together = base.generate(prompts, 6, **options)
    for number, edit in enumerate(edits[:3]):
        with edit:
            assert together[number] == base.generate(prompts[number : number + 1], 6, **options)[0]
    assert together[3] == plain[3]
    assert together[:3] != plain[:3]


@pytest.mark.parametrize("settings", [{}, {"n_edits": 2}])
def test_episodes_together_equal_episodes_one_at_a_time(settings):
    together, apart = (
        batch_gradient(built(at_once=n, **settings), EditBatch(EXAMPLES)) for n in (None, 1)
    )
    assert torch.allclose(together.sums, apart.sums, atol=1e-12)
    for a, b in zip(together.gradients, apart.gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert any(bool((gradient != 0).any()) for gradient in together.gradients)


def test_it_is_fitted_and_tested_and_its_checkpoint_edits_alike(tmp_path: Path):
    base = tiny_base("t5", torch.float32)
    options = {
        "accelerator": "cpu",
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
        "protocol": Protocol(chunk_size=4, max_new_tokens=4),
    }
    settings = {**SMALL, "c_edit": 1.0, "lr_lr": 1e-2, "edit_lr": 1e-2, "accumulate": 4}
    method, facts = MEND(base, **settings), data(tmp_path)
    first = EditTrainer(max_epochs=1, **options)
    first.fit(method, facts)
    start = float(first.callback_metrics["train/loss_edit"])
    trainer = EditTrainer(max_epochs=15, **options)
    trainer.fit(method, facts)
    assert float(trainer.callback_metrics["train/loss_edit"]) < 0.8 * start
    trainer.save_checkpoint(tmp_path / "t5.ckpt")
    again = MEND(base, checkpoint=str(tmp_path / "t5.ckpt"))
    one, other = (m.edit(REQUESTS).deltas() for m in (method, again))
    assert all(torch.equal(delta, other[name]) for name, delta in one.items())
    facts.path = facts.train_path
    (scores,) = trainer.test(again, facts, verbose=False)
    assert {"rewrite/tf_all", "rewrite/gen_em", "locality/keep_top1"} <= scores.keys()
    for number, request in enumerate(REQUESTS):
        before = float(answer_loss(base, rows_of(base))[number])
        with again.edit([request]):
            assert float(answer_loss(base, rows_of(base))[number]) < before
