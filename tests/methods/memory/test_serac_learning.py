"""SERAC: losses, training steps, checkpoints and resume."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import edit_kinds
import lightning.pytorch as pl
import pytest
import torch
from fit_support import SaveEachStep, fitted_by_ranks, state
from serac_support import (
    ANSWERS,
    EXAMPLES,
    PROMPTS,
    SMALL,
    asked,
    data,
    each_family,
    fit,
    logits,
    outcome,
    serac,
)
from support import REQUESTS, tiny_base
from tokenizers.processors import TemplateProcessing

from kedit_lightning import BaseModel, EditRequest, EditTrainer
from kedit_lightning.data import Requests
from kedit_lightning.errors import (
    BaseModelMismatchError,
    CheckpointError,
    MissingNeedsError,
    UnsupportedUseError,
)
from kedit_lightning.methods import SERAC
from kedit_lightning.methods.memory.serac import scope_losses as scope_learning
from kedit_lightning.methods.memory.serac.scope_losses import (
    LossSums,
    counterfactual_rows,
    inside_loss,
    loss_weights,
    outside_loss,
    prompt_hidden_states,
    statement_ids,
)
from kedit_lightning.requests import EditExample


def classifier_loss(inside, near, far):
    """Loss of squared distances, with a token of an answer that costs nothing. Shape ``[]``."""
    token = torch.zeros(1, dtype=torch.float64)
    kinds = [inside_loss(inside), outside_loss(near), outside_loss(far), (token, token)]
    sums = LossSums.of(kinds)
    return (loss_weights(sums.counts, 1.0, 1.0) * sums.losses).sum()


def test_the_loss_of_the_classifier_equals_binary_cross_entropy():
    inside, near, far = (torch.rand(n, dtype=torch.float64) * 3 + 0.01 for n in (4, 5, 6))
    entropy = torch.nn.functional.binary_cross_entropy
    parts = [
        entropy((-d).exp(), torch.full_like(d, label))
        for d, label in ((inside, 1.0), (near, 0.0), (far, 0.0))
    ]
    wanted = (parts[0] + (parts[1] + parts[2]) / 2) / 2
    torch.testing.assert_close(classifier_loss(inside, near, far), wanted)
    assert torch.isfinite(classifier_loss(inside, 0 * near, far))
    torch.testing.assert_close(classifier_loss(inside, near[:0], far[:0]), parts[0])


def test_rephrases_are_in_the_scope_of_their_own_edit_alone():
    base = tiny_base("llama")
    method = serac(base)
    method.configure_model()
    networks = method.network.scope
    with torch.no_grad():  # distances of about 1, at which every pair costs something
        networks.projection.weight.mul_(0.1)

    def place(prompt):
        rows = base.rows([prompt])
        hidden = base.forward(rows, output_hidden_states=True).hidden_states
        block = int(networks.plan.module.rsplit(".", 1)[1])
        return networks.projection(networks.norm(hidden[block + 1][0].mean(0)))

    def apart(one, other):
        return (place(one) - place(other)).square().sum()

    twin = EditExample.from_request(EditRequest(PROMPTS[0], "Italy"), "twin", EXAMPLES[1].probes)
    examples = [EXAMPLES[0], EXAMPLES[1], twin]
    inside, near, far = [], [], []
    for this in examples:
        own = this.requests[0].prompt
        asked = [p.prompt for p in this.probes if p.kind == "rephrase"]
        inside += [apart(prompt, own) for prompt in asked]
        near += [apart(p.prompt, own) for p in this.probes if p.kind == "locality"]
        others = [e.requests[0].prompt for e in examples if e.requests[0].prompt != own]
        far += [apart(prompt, other) for prompt in asked for other in others]
    wanted = classifier_loss(*(torch.stack(d) for d in (inside, near, far)))
    found = outcome(method, examples).scalars
    torch.testing.assert_close(found["loss_scope"], wanted.detach(), rtol=1e-6, atol=1e-6)
    limit = math.log(2)
    assert float(found["scope_hits"]) == pytest.approx(sum(d < limit for d in inside) / len(inside))
    false = [*near, *far]
    assert float(found["scope_false_alarms"]) == pytest.approx(
        sum(d < limit for d in false) / len(false)
    )


@each_family
def test_the_loss_of_answers_is_that_of_the_rows_asked_one_by_one(family):
    base = tiny_base(family)
    method = serac(base)
    edit = method.edit(REQUESTS)
    embedding = base.model.get_input_embeddings().weight
    losses = []
    for number, this in enumerate(EXAMPLES):
        for probe in (p for p in this.probes if p.kind != "locality"):
            question = base.encode(probe.prompt, probe.answers[0])
            answer = (*question.answer, base.tokenizer.eos_token_id)
            given = (*edit.entries[number].statement, *asked(base, probe.prompt))
            for length, wanted in enumerate(answer):
                ids = torch.tensor([[*given, *answer[:length]]])
                states = edit.networks.answer_states(ids, embedding)[0, -1]
                chances = edit.networks.logits(states, embedding).softmax(-1)
                losses.append(-math.log(chances[wanted]))
    assert float(outcome(method, EXAMPLES).scalars["loss_edit"]) == pytest.approx(
        sum(losses) / len(losses), abs=1e-6
    )


def test_answers_are_learned_behind_what_an_encoder_puts_behind_its_prompts():
    base = tiny_base("t5")
    tokenizer = copy.deepcopy(base.tokenizer)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    base = BaseModel(base.model, tokenizer)
    assert base.encoder.suffix == (tokenizer.eos_token_id,)
    edit = serac(base).edit(REQUESTS[:1])
    (row, *_), (count, *_) = counterfactual_rows(base, edit.networks, EXAMPLES[:1])
    with edit:
        answer = EXAMPLES[0].probes[0].answers[0]
        found = base.answer_logits(base.rows(PROMPTS[:1], [answer]))[0]
    embedding = base.model.get_input_embeddings().weight
    states = edit.networks.answer_states(torch.tensor([row]), embedding)
    wanted = edit.networks.logits(states, embedding)[0, -1 - count : -2]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_a_statement_ends_with_the_separator():
    base = tiny_base("llama")
    ids = statement_ids(base.encoder.of(base.tokenizer), REQUESTS[1])
    assert ids[0] == base.tokenizer.bos_token_id
    assert ids[-1] == base.tokenizer.eos_token_id
    assert base.tokenizer.decode(ids[1:-1]) == "Marie Curie was born in Berlin"


def test_a_step_learns_from_the_base_model_without_the_edits_on_its_stack():
    base = tiny_base("llama")
    method = serac(base)
    method.configure_model()
    plain = outcome(method, EXAMPLES)
    with edit_kinds.low_rank(base, layer=0):
        changed, _ = prompt_hidden_states(base, PROMPTS, method.network.scope.plan.module)
        found = outcome(method, EXAMPLES)
    assert not torch.allclose(
        changed, prompt_hidden_states(base, PROMPTS, base.layout.block(1).name)[0]
    )
    assert torch.equal(found.loss, plain.loss)
    assert all(
        torch.equal(a, b) for a, b in zip(found.mean_gradients, plain.mean_gradients, strict=True)
    )


# ---- what is not finite


def spoil(monkeypatch, is_bad):
    """Let the base model read NaN from prompts, of those read together, that are bad."""

    def read(base, prompts, module, images):
        hidden, mask = prompt_hidden_states(base, prompts, module, images)
        bad = torch.tensor([is_bad(prompt, prompts) for prompt in prompts])
        return hidden.masked_fill(bad[:, None, None], torch.nan), mask

    monkeypatch.setattr(scope_learning, "prompt_hidden_states", read)


def test_an_example_that_is_not_finite_is_left_out_and_counted(tmp_path, monkeypatch):
    base = tiny_base("llama")
    method = serac(base, **{**SMALL, "batch_size": 4})
    method.configure_model()
    rest = outcome(method, [*EXAMPLES[:1], *EXAMPLES[2:]])
    spoil(monkeypatch, lambda prompt, _: prompt == EXAMPLES[1].probes[1].prompt)
    found = outcome(method, EXAMPLES)
    assert (found.episodes, found.skipped) == (3, 1)
    assert torch.equal(found.loss, rest.loss)
    for a, b in zip(found.mean_gradients, rest.mean_gradients, strict=True):
        assert torch.equal(a, b)

    trainer = fit(method, tmp_path, max_epochs=2)
    assert trainer.callback_metrics["train/skipped_episodes"] == 2
    assert (int(method.network.skipped), int(method.network.updates)) == (2, 2)
    assert all(bool(torch.isfinite(p).all()) for p in method.parameters())


@pytest.mark.parametrize("alone", [True, False])
def test_a_step_with_no_finite_gradient_changes_no_parameter(tmp_path, monkeypatch, alone):
    method = serac(tiny_base("llama"), **SMALL)
    method.configure_model()
    before = [parameter.clone() for parameter in method.parameters()]
    # each by itself, or only what is read together with the prompts of other facts
    spoil(monkeypatch, lambda _, prompts: alone or len(set(PROMPTS) & set(prompts)) > 1)
    fit(method, tmp_path)
    assert (int(method.network.skipped), int(method.network.updates)) == (4, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


# ---- fit, checkpoints, resume


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_fit_learns_the_networks_alone_and_lowers_both_losses(family, tmp_path):
    base = tiny_base(family, torch.float32)
    method = SERAC(base, **SMALL)
    trainer = fit(method, tmp_path)
    first = dict(trainer.callback_metrics)
    trainer = fit(method, tmp_path, max_epochs=60)
    last = trainer.callback_metrics
    for name in ("train/loss_edit", "train/loss_scope"):
        assert float(last[name]) < 0.5 * float(first[name]), name
    assert float(last["train/edit_success"]) == 1.0
    assert float(last["train/scope_hits"]) == 1.0
    assert method.network.updates == 122
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    checkpoint = torch.load(tmp_path / "fit.ckpt", weights_only=True)
    assert all(name.startswith("network.") for name in checkpoint["state_dict"])
    edit = method.edit(REQUESTS)
    rephrases = [e.probes[1].prompt for e in EXAMPLES]
    near = [e.probes[3].prompt for e in EXAMPLES]
    plain = logits(base, near, ["Paris"] * 4)[0]
    with edit:
        found, rows = logits(base, rephrases, ANSWERS)
        hits = (found.argmax(-1) == rows.answer_ids) | ~rows.answer_mask
        assert bool(hits.all())
        assert torch.equal(logits(base, near, ["Paris"] * 4)[0], plain)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("how", ["load_from_checkpoint", "setting"])
def test_a_loaded_checkpoint_gives_the_same_answers(family, how, tmp_path):
    base = tiny_base(family)
    method = SERAC(base, **SMALL, scope_width=8)
    fit(method, tmp_path).save_checkpoint(tmp_path / "fit.ckpt")
    if how == "setting":
        again = SERAC(base, checkpoint=str(tmp_path / "fit.ckpt"))
    else:
        again = SERAC.load_from_checkpoint(tmp_path / "fit.ckpt", base_model=base)
    found = []
    for each in (method, again):
        with each.edit(REQUESTS):
            found.append(logits(base)[0])
    assert torch.equal(*found)


def test_a_resumed_fit_equals_an_unbroken_one_step_for_step(tmp_path):
    base = tiny_base("gpt2")
    settings = {**SMALL, "vary_targets": True}
    whole = SERAC(base, **settings)
    fit(whole, tmp_path, max_epochs=2, callbacks=[SaveEachStep(tmp_path)])
    assert whole.network.updates == 4
    wanted = state(whole)
    for stop in (1, 2, 3):
        rest = SERAC(base, **settings)
        fit(rest, tmp_path, ckpt_path=tmp_path / f"{stop}.ckpt", max_epochs=2)
        for name, tensor in state(rest).items():
            assert torch.equal(tensor, wanted[name]), (stop, name)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    base = tiny_base("llama")
    path = tmp_path / "fit.ckpt"
    fit(SERAC(base, **SMALL), tmp_path).save_checkpoint(path)
    with pytest.raises(UnsupportedUseError, match="blocks 2, not 3"):
        SERAC(base, checkpoint=str(path), blocks=3).edit(REQUESTS)
    wide = tiny_base("llama", hidden_size=64)
    with (
        pytest.warns(UserWarning, match="fitted on base model"),
        pytest.raises(BaseModelMismatchError, match="hidden width of 32, and 'llama' has 64"),
    ):
        SERAC(wide, checkpoint=str(path)).edit(REQUESTS)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["plan"]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="holds no learned network"):
        SERAC(base, checkpoint=str(tmp_path / "other.ckpt")).edit(REQUESTS)


def test_data_that_it_cannot_learn_from_is_refused_by_name():
    method = SERAC("there/is-no-such-model")
    bare = EditExample.from_request(REQUESTS[0], "bare")
    with pytest.raises(MissingNeedsError, match="'bare' lacks 'rephrases'"):
        method.check_examples([EXAMPLES[1], bare], fitting=True)
    several = EditExample((REQUESTS[0], REQUESTS[1]), EXAMPLES[0].probes, "both")
    with pytest.raises(UnsupportedUseError, match="'both' has several"):
        method.check_examples([several], fitting=True)
    method.check_examples([several])


def test_edits_are_validated_during_a_fit(tmp_path):
    base = tiny_base("llama", torch.float32)
    seen = []

    class Seen(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics.get("val/rephrase/tf_all", 0.0)))

    path = Path(data(tmp_path).train_path)
    method = SERAC(base, **SMALL)
    trainer = EditTrainer(
        max_epochs=70,
        check_val_every_n_epoch=10,
        accelerator="cpu",
        callbacks=[Seen()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(method, Requests(train_path=path, val_path=path, seed=3))
    assert seen[9] == 0.0
    assert seen[-1] == 1.0
    assert float(trainer.callback_metrics["val/locality/keep_top1"]) == 1.0
    assert len(base.edits) == 0


def test_half_precision_plugins_leave_the_networks_whole(tmp_path):
    base = tiny_base("llama", torch.float32)
    plain = SERAC(base, **SMALL)
    fit(plain, tmp_path, max_epochs=2)
    wanted = state(plain)
    for precision in ("bf16-true", "bf16-mixed"):
        method = SERAC(base, **SMALL)
        fit(method, tmp_path, max_epochs=2, precision=precision)
        assert method.network.updates == 4
        assert method.network.skipped == 0
        assert {p.dtype for p in method.parameters()} == {torch.float32}
        for name, tensor in state(method).items():
            assert torch.allclose(tensor, wanted[name], atol=1e-2), (precision, name)


@pytest.mark.slow
def test_two_ranks_end_equal_to_each_other_and_to_one_rank_on_all_the_data(tmp_path):
    # three records a rank: the last batch of an epoch has one of them, not two
    one, first, second = fitted_by_ranks(
        tmp_path,
        "SERAC",
        lambda ranks: {**SMALL, "batch_size": 4 // ranks, "blocks": 1},
        epochs=3,
        source="serac_support",
        count=6,
    )
    assert first["network.updates"] == 6
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], tensor, rtol=1e-9, atol=1e-11), name
