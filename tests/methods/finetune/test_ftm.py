"""FT-M against plain fine-tuning of the weights, its box, its losses and its epochs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support import FAMILIES, REQUESTS, tiny_base, tiny_model

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.base_models.taps import capture, visiting
from kedit_lightning.errors import ModuleNotLocatedError, NonFiniteError, UnsupportedUseError
from kedit_lightning.methods import FTM
from kedit_lightning.methods.finetune.shared.fine_tuning import fine_tune
from kedit_lightning.methods.finetune.shared.fine_tuning_method import finetune_defaults
from kedit_lightning.methods.shared.answer_passes import AnswerPasses
from kedit_lightning.methods.shared.inner_loop import zero_change
from kedit_lightning.methods.shared.published_settings import published_tables


def answered(base, requests=REQUESTS, side="right"):
    return base.rows([r.prompt for r in requests], [r.target_new for r in requests], None, side)


def row_losses(base, requests=REQUESTS, objective="target_new"):
    return AnswerPasses.of(base, requests, [base.layout.block(0).down]).losses(objective)


def dense_reference(base, module, requests, lr, steps, box=float("inf"), weight_decay=0.0):
    """Fine-tune a copy's own weights with torch alone; returns the change by parameter name."""
    model = copy.deepcopy(base.model)
    names = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] == module]
    tuned = [model.get_parameter(n).requires_grad_() for n in names]
    start = [p.detach().clone() for p in tuned]
    optimizer = torch.optim.Adam(tuned, lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        losses = []
        for request in requests:
            rows = answered(base, [request])
            logits = model(**rows.inputs).logits[0, int(rows.prompt_end[0]) : -1]
            losses.append(F.cross_entropy(logits, rows.answer_ids[0]))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for p, p0 in zip(tuned, start, strict=True):
                p.copy_(p.clamp(p0 - box, p0 + box))
    return {n: p.detach() - p0 for n, p, p0 in zip(names, tuned, start, strict=True)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_equals_fine_tuning_of_the_weights(kind):
    base = tiny_base(kind)
    ftm = FTM(base_model=base, lr=1e-2, steps=6, batch_size=4, stop_loss=0.0)
    edit = ftm.edit(REQUESTS)
    (module,) = ftm.modules_trained
    expected = dense_reference(base, module, REQUESTS, 1e-2, 6)
    found = edit.deltas()
    assert found.keys() == expected.keys()
    assert (f"{module}.bias" in found) == (kind != "llama")  # a bias is trained where there is one
    for name, delta in expected.items():
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(found[name], delta, rtol=0, atol=1e-10)


def test_weight_decay_pulls_the_change_to_zero():
    base = tiny_base("llama")
    size = [
        FTM(base_model=base, lr=1e-2, steps=20, weight_decay=decay).edit(REQUESTS[:1]).deltas()
        for decay in (0.0, 1.0)
    ]
    free, pulled = (sum(d.square().sum() for d in deltas.values()) for deltas in size)
    assert pulled < 0.8 * free


# ---- the box


def test_every_step_stays_in_the_box():
    torch.manual_seed(0)
    tensors = [torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)]
    wanted = torch.randn(6, 3, 4, dtype=torch.float64) * 3
    seen = []

    def loss_of(indices):
        seen.append(float(tensors[0].detach().abs().max()))
        return (tensors[0] - wanted[indices]).square().sum()

    order = torch.Generator().manual_seed(0)
    fine_tune(tensors, 6, loss_of, order, lr=0.1, epochs=5, batch_size=2, norm_constraint=0.25)
    assert len(seen) == 15  # five epochs of three mini-batches
    assert max(seen) == 0.25  # reached, never passed


def test_box_holds_for_an_edit_and_equals_clamped_weights():
    base = tiny_base("gpt2")
    ftm = FTM(base_model=base, lr=1e-2, steps=6, batch_size=4, norm_constraint=2e-2, stop_loss=0.0)
    deltas = ftm.edit(REQUESTS).deltas()
    for name, delta in dense_reference(
        base, ftm.modules_trained[0], REQUESTS, 1e-2, 6, box=2e-2
    ).items():
        assert delta.abs().max() >= 2e-2 * (1 - 1e-6)
        assert deltas[name].abs().max() <= 2e-2 * (1 + 1e-6)
        torch.testing.assert_close(deltas[name], delta, rtol=0, atol=1e-10)


def test_an_empty_box_changes_no_bit():
    base = tiny_base("llama", torch.float32)
    rows = answered(base)
    before = base.answer_logits(rows)
    with FTM(base_model=base, norm_constraint=0.0, steps=2).edit(REQUESTS) as edit:
        assert all(not bool(delta.any()) for delta in edit.deltas().values())
        assert torch.equal(base.answer_logits(rows), before)


def test_bfloat16_weights_move_by_less_than_their_own_resolution():
    base = tiny_base("gpt2", torch.bfloat16)
    ftm = FTM(base_model=base, norm_constraint=5e-5, steps=3)
    for name, delta in ftm.edit(REQUESTS[:1]).deltas().items():
        assert delta.dtype == torch.float32
        weight = base.model.get_parameter(name).float()
        stuck = (delta != 0) & ((weight + delta).bfloat16().float() == weight)
        assert delta.abs().max() <= 5e-5 * (1 + 1e-6)
        if weight.dim() == 2:
            assert stuck.any()  # written into the weight, these would have been lost


# ---- the loss


@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_is_the_models_own(kind):
    base = tiny_base(kind)
    losses = row_losses(base)
    for request, loss in zip(REQUESTS, losses, strict=True):
        rows = answered(base, [request])
        labels = torch.full_like(rows.inputs["input_ids"], -100)
        labels[:, int(rows.prompt_end[0]) + 1 :] = rows.answer_ids
        reference = base.model(**rows.inputs, labels=labels).loss
        assert abs(float(loss - reference)) < 1e-6  # transformers computes its loss in float32


def test_prompt_last_reads_all_tokens_from_one_position():
    base = tiny_base("gpt2")
    rows = answered(base)
    losses = row_losses(base, objective="prompt_last")
    logits = base.forward(rows).logits.log_softmax(-1)
    for i in range(len(rows)):
        ids = rows.answer_ids[i][rows.answer_mask[i]]
        expected = -logits[i, rows.prompt_end[i], ids].mean()
        torch.testing.assert_close(losses[i], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("answer", "tokens"), [("Paris", 1), ("Rome", 2)])
def test_prompt_last_differs_for_answers_of_several_tokens(answer, tokens):
    base = tiny_base("llama")
    request = EditRequest("The Eiffel Tower is in", answer)
    assert int(answered(base, [request]).answer_mask.sum()) == tokens
    ours, released = (
        row_losses(base, [request], objective) for objective in ("target_new", "prompt_last")
    )
    assert torch.equal(ours, released) == (tokens == 1)


def test_the_objective_is_what_is_trained():
    base = tiny_base("gpt2")
    for objective in ("target_new", "prompt_last"):
        ftm = FTM(base_model=base, objective=objective, lr=1e-2, steps=15)
        before = row_losses(base, objective=objective).mean()
        with ftm.edit(REQUESTS) as edit:
            after = row_losses(base, objective=objective).mean()
        assert after < before - 1
        assert edit.origin.notes["loss"] == pytest.approx(float(after), rel=0.2)


def test_end_of_text_is_trained_on_request():
    base = tiny_base("llama")
    request = REQUESTS[0]
    eos = base.tokenizer.eos_token_id
    rows = base.rows([f"{request.prompt} {request.target_new}"])
    likeliest = []
    for wanted in (False, True):
        ftm = FTM(base_model=base, lr=1e-2, steps=40, eos_in_target=wanted)
        with ftm.edit([request]):
            logits = base.logits_at(rows, rows.prompt_end[:, None])
            likeliest.append(int(logits.argmax()))
    assert likeliest[0] != eos
    assert likeliest[1] == eos


def test_end_of_text_needs_such_a_token():
    base = tiny_base("llama")
    base.tokenizer = copy.deepcopy(base.tokenizer)
    base.tokenizer.eos_token = None
    with pytest.raises(UnsupportedUseError, match="eos_in_target"):
        FTM(base_model=base, eos_in_target=True).edit(REQUESTS[:1])


# ---- what is trained, and what is not


def test_nothing_but_the_change_gets_a_gradient():
    base = tiny_base("gpt2")
    names = [block.name for block in base.layout.blocks]
    changes = {
        base.layout.block(2).down: zero_change(base.module(base.layout.block(2).down), base.dtype)
    }
    rows = answered(base)
    with torch.enable_grad(), visiting(base.model, changes), capture(base.model, names) as seen:
        loss = base.answer_logits(rows).square().mean()
    loss.backward()
    (change,) = changes.values()
    assert change.dense.grad.any()
    assert change.bias.grad.any()
    assert all(parameter.grad is None for parameter in base.model.parameters())
    # No graph below the edited block: those blocks cost no backward pass and keep no activations.
    assert [seen.outputs[name].requires_grad for name in names] == [False, False, True, True]


def test_layers_may_be_several_and_count_from_the_end():
    base = tiny_base("llama")
    ftm = FTM(base_model=base, layers=[0, -1], lr=1e-2, steps=2)
    deltas = ftm.edit(REQUESTS[:1]).deltas()
    assert list(deltas) == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
    ]
    assert all(bool(delta.any()) for delta in deltas.values())


def test_settings_follow_the_base_model(monkeypatch):
    base = tiny_base("gpt2")
    FTM(base_model=base).configure_model()
    derived = FTM(base_model=base)
    derived.configure_model()
    assert derived.modules_trained == ("transformer.h.3.mlp.c_proj",)
    assert (derived.settings.steps, derived.settings.norm_constraint) == (25, float("inf"))
    published = {"layers": [0], "steps": 40, "norm_constraint": 5e-4}
    monkeypatch.setitem(published_tables()["FTM"], ("gpt2", 4, 32), published)
    known = FTM(base_model=base)
    known.configure_model()
    assert known.modules_trained == ("transformer.h.0.mlp.c_proj",)
    assert (known.settings.steps, known.settings.norm_constraint) == (40, 5e-4)
    own = FTM(base_model=base, layers=[1], steps=3, norm_constraint=float("inf"))
    own.configure_model()
    assert own.modules_trained == ("transformer.h.1.mlp.c_proj",)
    edit = known.edit(REQUESTS[:1])  # it records the values used, not what was left open
    used = {name: edit.origin.settings[name] for name in ("layers", "steps", "norm_constraint")}
    assert used == {"layers": [0], "steps": 40, "norm_constraint": 5e-4}
    assert (own.settings.steps, own.settings.norm_constraint) == (3, float("inf"))


@pytest.mark.parametrize(("blocks", "layer"), [(32, 21), (6, 4), (1, 0)])
def test_the_default_layer_follows_the_number_of_blocks(blocks, layer):
    base = tiny_base("llama", num_hidden_layers=blocks)
    assert finetune_defaults(base).layers == (layer,)


# ---- epochs


def test_mini_batches_cover_all_rows_in_every_epoch():
    tensors = [torch.zeros(2, requires_grad=True)]
    seen: list[list[int]] = []

    def loss_of(indices):
        seen.append(indices)
        return (tensors[0] - 1).square().sum()

    order = torch.Generator().manual_seed(0)
    fine_tune(tensors, 10, loss_of, order, lr=1e-3, epochs=3, batch_size=4, norm_constraint=1.0)
    assert [len(batch) for batch in seen] == [4, 4, 2] * 3
    epochs = [[*seen[i], *seen[i + 1], *seen[i + 2]] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]  # shuffled anew


def test_batches_below_the_stop_loss_are_skipped_and_training_ends():
    tensors = [torch.zeros(1, requires_grad=True)]
    losses = iter([0.5, 0.001, 0.009, 0.009])
    steps = []

    def loss_of(indices):
        steps.append(float(tensors[0].detach()))
        return next(losses) + 0 * tensors[0].sum() + (tensors[0] - tensors[0].detach()).sum()

    order = torch.Generator().manual_seed(0)
    history = fine_tune(tensors, 2, loss_of, order, lr=0.1, epochs=9, stop_loss=0.01)
    assert history == pytest.approx([0.2505, 0.009])  # the second epoch is the last
    assert steps[0] == 0
    assert steps[1] == steps[2] == steps[3] == float(tensors[0].detach()) != 0  # one update in all


def test_one_request_is_the_same_under_any_batch_size():
    base = tiny_base("llama")
    one, many = (
        FTM(base_model=base, lr=1e-2, steps=4, batch_size=size).edit(REQUESTS[:1]).deltas()
        for size in (1, 64)
    )
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_chunk_is_trained_breadth_first():
    base = tiny_base("gpt2")
    together = FTM(base_model=base, lr=1e-2, steps=30, batch_size=2)
    with together.edit(REQUESTS):
        breadth = row_losses(base)
    with base.edits.restored():
        for request in REQUESTS:  # depth first: all steps on one, then on the next
            together.edit([request]).apply()
        depth = row_losses(base)
    assert breadth.max() < depth.max()


def test_the_seed_orders_mini_batches():
    base = tiny_base("llama")

    def delta(seed):
        ftm = FTM(base_model=base, lr=1e-2, steps=3, batch_size=1, seed=seed)
        return next(iter(ftm.edit(REQUESTS).deltas().values()))

    assert torch.equal(delta(0), delta(0))
    assert not torch.equal(delta(0), delta(1))


def test_the_order_of_requests_does_not_matter_in_a_whole_batch():
    base = tiny_base("gpt2")
    ftm = FTM(base_model=base, lr=1e-2, steps=5, batch_size=len(REQUESTS))
    one, other = ftm.edit(REQUESTS).deltas(), ftm.edit(REQUESTS[::-1]).deltas()
    for name, delta in one.items():
        torch.testing.assert_close(delta, other[name], rtol=0, atol=1e-9)


def test_trains_on_top_of_the_stack():
    base = tiny_base("llama")
    ftm = FTM(base_model=base, layers=[2], lr=1e-2, steps=5)
    other = FTM(base_model=base, layers=[1], lr=1e-2, steps=5).edit(REQUESTS[1:2])
    with other:
        found = ftm.edit(REQUESTS[:1])
    model = tiny_model("llama")
    with torch.no_grad():
        for name, delta in other.deltas().items():
            model.get_parameter(name).add_(delta)
    written = FTM(base_model=BaseModel(model, base.tokenizer), layers=[2], lr=1e-2, steps=5)
    for name, delta in written.edit(REQUESTS[:1]).deltas().items():
        torch.testing.assert_close(found.deltas()[name], delta, rtol=0, atol=1e-9)


# ---- bad input


def test_refuses_what_it_cannot_do():
    base = tiny_base("llama")
    with pytest.raises(ModuleNotLocatedError, match="layer 9 does not exist"):
        FTM(base_model=base, layers=[9]).edit(REQUESTS[:1])
    for wrong in ({"layers": []}, {"batch_size": 0}, {"steps": 0}, {"norm_constraint": -1.0}):
        with pytest.raises(UnsupportedUseError, match=next(iter(wrong))):
            FTM(base_model=base, **wrong).edit(REQUESTS[:1])


def test_refuses_a_change_that_is_not_finite():
    base = tiny_base("gpt2", torch.float32)
    with pytest.raises(NonFiniteError, match=r"loss of layer 'transformer\.h\.3\.mlp\.c_proj'"):
        FTM(base_model=base, lr=1e37, steps=5, stop_loss=0.0).edit(REQUESTS)
