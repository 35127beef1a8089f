"""Taps: what they read is what flowed, what they change is what was asked, and nothing stays."""

from __future__ import annotations

import pytest
import torch
from support import FAMILIES, REQUESTS, tiny_base
from torch import nn

from kedit_lightning.base_models.taps import (
    add_at,
    capture,
    change_inputs,
    change_output,
    stop_after,
    zero_leaves,
)
from kedit_lightning.edits import LowRankEdit
from kedit_lightning.edits.projections import as_rows, is_transposed, projection_shape

#: Besides the usual families one that flattens its rows, and one with an encoder.
ALL = (*FAMILIES, "opt", "t5")


def _rows(base, **options):
    return base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS], **options)


def _hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


# ---- capture


@pytest.mark.parametrize("family", ALL)
def test_captures_what_a_projection_received_and_returned(family):
    base = tiny_base(family)
    rows = _rows(base)
    names = [base.layout.block(i).down for i in (0, 2)]
    with torch.no_grad(), capture(base.model, names) as seen:
        base.forward(rows)
    ids = rows.inputs["decoder_input_ids" if base.is_encoder_decoder else "input_ids"]
    tokens = ids.shape[1]
    for name in names:
        module = base.module(name)
        assert seen.inputs[name].shape == (4, tokens, projection_shape(module)[0])
        assert seen.outputs[name].shape == (4, tokens, 32)
        again = as_rows(module(seen.inputs[name].flatten(0, 1)), 4)
        torch.testing.assert_close(again, seen.outputs[name], rtol=0, atol=1e-12)
    assert not _hooks(base.model)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_columns_of_a_capture_are_those_of_the_rows(family):
    """One row alone and the same row among others show the same key."""
    base = tiny_base(family)
    name = base.layout.block(1).down
    subjects = [r.subject for r in REQUESTS]
    for side in ("left", "right"):
        rows = _rows(base, subjects=subjects, padding_side=side)
        with torch.no_grad(), capture(base.model, [name]) as seen:
            base.forward(rows)
        keys = seen.inputs[name][torch.arange(4), rows.subject_end]
        for i, request in enumerate(REQUESTS):
            one = base.rows([request.prompt], [request.target_new], [request.subject])
            with torch.no_grad(), capture(base.model, [name]) as alone:
                base.forward(one)
            key = alone.inputs[name][0, one.subject_end[0]]
            torch.testing.assert_close(keys[i], key, rtol=0, atol=1e-10)


def test_a_block_that_returns_a_tuple_is_read_like_one_that_returns_a_tensor():
    for family in ("gpt2", "bloom"):
        settings = {"n_layer": 2, "n_head": 4} if family == "bloom" else {}
        base = tiny_base(family, **settings)
        first, second = (base.layout.block(i).name for i in (0, 1))
        with torch.no_grad(), capture(base.model, [first, second]) as seen:
            base.forward(_rows(base))
        assert torch.equal(seen.outputs[first], seen.inputs[second])


def test_a_second_pass_overwrites_and_history_is_kept():
    base = tiny_base("llama")
    name = base.layout.block(0).down
    embedding = base.model.get_input_embeddings().weight
    embedding.requires_grad_(True)
    with capture(base.model, [name]) as seen:
        base.forward(base.rows(["Rome is in the south of"]))
        first = seen.inputs[name]
        base.forward(base.rows(["Rome is"]))
    assert seen.inputs[name].shape[1] < first.shape[1]
    (gradient,) = torch.autograd.grad(seen.outputs[name].sum(), embedding)
    assert bool((gradient != 0).any())
    embedding.requires_grad_(False)


def test_a_capture_inside_an_edit_sees_the_edited_output():
    from edit_kinds import low_rank

    base = tiny_base("llama")
    name = base.layout.block(1).down
    rows = _rows(base)
    with torch.no_grad(), capture(base.model, [name]) as plain:
        base.forward(rows)
    edit = low_rank(base)
    a, b = edit.factors[name]
    with edit, torch.no_grad(), capture(base.model, [name]) as seen:
        base.forward(rows)
    wanted = plain.outputs[name] + plain.inputs[name] @ a.T @ b.T
    torch.testing.assert_close(seen.outputs[name], wanted)


# ---- stop


@pytest.mark.parametrize("family", ALL)
def test_nothing_above_the_stop_runs(family):
    base = tiny_base(family)
    stop = base.layout.block(1).down
    ran = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in base.model.named_modules()
        if not list(module.children())
    ]
    base.forward(_rows(base))
    whole = ran.copy()
    ran.clear()
    with capture(base.model, [stop]) as seen, stop_after(base.model, stop):
        base.forward(_rows(base))
        pytest.fail("the statement behind the pass must not run")
    for handle in handles:
        handle.remove()
    assert ran == whole[: whole.index(stop) + 1]
    assert base.layout.block(2).down in whole
    assert seen.outputs[stop].shape[0] == 4
    assert not _hooks(base.model)


def test_a_stopped_pass_leaves_the_model_as_it_was():
    base = tiny_base("gpt2")
    rows = _rows(base)
    before = base.answer_logits(rows)
    with stop_after(base.model, base.layout.block(0).down):
        base.forward(rows)
    assert torch.equal(base.answer_logits(rows), before)
    hidden = base.model(**rows.inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == 5


def test_other_exceptions_pass_through_a_stop():
    base = tiny_base("gpt2")
    with pytest.raises(ZeroDivisionError), stop_after(base.model, base.layout.block(0).down):
        1 / 0  # noqa: B018
    assert not _hooks(base.model)


# ---- change


@pytest.mark.parametrize("family", [*ALL, "bloom"])
def test_changes_an_output_in_the_columns_asked_for(family):
    settings = {"n_layer": 3, "n_head": 4} if family == "bloom" else {}
    base = tiny_base(family, **settings)
    rows = _rows(base, subjects=[r.subject for r in REQUESTS])
    columns = rows.prompt_end
    vectors = torch.arange(4.0)[:, None].double().expand(4, 32)
    for name in (base.layout.block(1).down, base.layout.block(1).name):
        with torch.no_grad(), capture(base.model, [name]) as plain:
            base.forward(rows)
        with (
            torch.no_grad(),
            change_output(base.model, name, lambda y: add_at(y, columns, vectors)),
            capture(base.model, [name]) as seen,
        ):
            base.forward(rows)
        difference = seen.outputs[name] - plain.outputs[name]
        at = torch.zeros(difference.shape[:2], dtype=torch.bool)
        at[torch.arange(4), columns] = True
        torch.testing.assert_close(difference[at], vectors, rtol=0, atol=1e-12)
        assert torch.equal(difference[~at], torch.zeros_like(difference[~at]))
    assert not _hooks(base.model)


@pytest.mark.parametrize("family", ALL)
def test_changed_inputs_are_what_the_module_and_the_edits_on_it_receive(family):
    base = tiny_base(family)
    rows = _rows(base)
    name = base.layout.block(1).down
    d_in, d_out = projection_shape(base.module(name))
    factors = (torch.ones(1, d_in).double(), torch.ones(d_out, 1).double())
    with torch.no_grad(), LowRankEdit(base, {name: factors}), capture(base.model, [name]) as seen:
        base.forward(rows)
        received = 2 * seen.inputs[name] + 1
        with change_inputs(base.model, {name: lambda x: 2 * x + 1}):
            base.forward(rows)
        wanted = base.module(name)(received)  # with the edit
    assert torch.equal(seen.inputs[name], received)
    torch.testing.assert_close(seen.outputs[name], wanted)


def test_a_tuple_keeps_what_stands_behind_its_first_tensor():
    class Pair(nn.Module):
        def forward(self, x):
            return x, "kept", 3

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return self.pair(x)

    model = Whole()
    with change_output(model, "pair", lambda y: y + 1):
        output = model(torch.zeros(1, 2, 3))
    assert torch.equal(output[0], torch.ones(1, 2, 3))
    assert output[1:] == ("kept", 3)


def test_what_is_added_carries_gradients():
    base = tiny_base("llama")
    rows = _rows(base)
    vector = torch.zeros(4, 32, dtype=torch.float64, requires_grad=True)
    name = base.layout.block(1).down
    with change_output(base.model, name, lambda y: add_at(y, rows.prompt_end, vector)):
        loss = base.answer_log_probs(rows).sum()
    (gradient,) = torch.autograd.grad(loss, vector)
    assert bool((gradient.abs().sum(1) > 0).all())


# ---- gradients


@pytest.mark.parametrize("family", ALL)
def test_zero_leaves_give_the_gradients_of_weights(family):
    base = tiny_base(family)
    rows = _rows(base)
    names = base.layout.block(1).projections
    with zero_leaves(base.model, names) as (seen, leaves):
        loss = base.answer_log_probs(rows).sum()
        gradients = torch.autograd.grad(loss, [leaves[name] for name in names])
    assert all(p.grad is None for p in base.model.parameters())
    assert not _hooks(base.model)
    for name, gradient in zip(names, gradients, strict=True):
        module = base.module(name)
        assert gradient.shape[:2] == seen.inputs[name].shape[:2]
        product = torch.einsum("bto,bti->oi", gradient, seen.inputs[name])
        module.requires_grad_(True)
        base.answer_log_probs(rows).sum().backward()
        weight = module.weight.grad.T if is_transposed(module) else module.weight.grad
        torch.testing.assert_close(product, weight, rtol=0, atol=1e-10)
        if getattr(module, "bias", None) is not None:
            torch.testing.assert_close(gradient.sum((0, 1)), module.bias.grad, atol=1e-10, rtol=0)
        module.requires_grad_(False)
        module.weight.grad = None
        if getattr(module, "bias", None) is not None:
            module.bias.grad = None


def test_zeros_change_no_number_and_inputs_have_no_history():
    base = tiny_base("gpt2")
    rows = _rows(base)
    before = base.answer_logits(rows)
    names = [base.layout.block(i).down for i in (0, 1)]
    with zero_leaves(base.model, names) as (seen, leaves):
        assert torch.equal(base.answer_logits(rows), before)
    # The upper input depends on the lower zero; what is kept of it must not.
    assert not any(x.requires_grad for x in seen.inputs.values())
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves.values())


def _checkpoint(model, reentrant):
    """Switch on or off what transformers renamed in 5.2x: the old names warn there."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if reentrant is None:
        getattr(model, f"{kind}_checkpointing_disable")()
    else:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    base = tiny_base(family, **(dropout if family == "gpt2" else {}))
    rows = _rows(base)
    names = [name for i in (0, 2) for name in base.layout.block(i).projections]
    with zero_leaves(base.model, names) as (_, leaves):
        base.answer_log_probs(rows).sum().backward()
        wanted = {name: leaves[name].grad for name in names}
    base.model.train()
    _checkpoint(base.model, reentrant)
    if reentrant:  # needs an input that requires grad
        base.model.enable_input_require_grads()
    runs = []
    handle = base.module(names[-2]).register_forward_hook(lambda *_: runs.append(1))
    with zero_leaves(base.model, names) as (seen, leaves):
        base.answer_log_probs(rows).sum().backward()
    handle.remove()
    if reentrant:
        base.model.disable_input_require_grads()
    _checkpoint(base.model, None)
    base.model.eval()
    assert len(runs) == 2, "nothing was checkpointed"
    for name in names:
        torch.testing.assert_close(leaves[name].grad, wanted[name], rtol=0, atol=1e-12)
        assert seen.inputs[name].shape[:2] == leaves[name].shape[:2]


def test_each_backward_pass_has_zeros_of_its_own():
    base = tiny_base("llama")
    name = base.layout.block(1).down
    rows = _rows(base)
    with zero_leaves(base.model, [name]) as (_, leaves):
        base.answer_log_probs(rows).sum().backward()
        first = leaves[name].grad.clone()
        base.answer_log_probs(rows).sum().backward()
        torch.testing.assert_close(leaves[name].grad, first)


# ---- what stays


@pytest.mark.parametrize(
    "tap", ["capture", "stop_after", "change_output", "change_inputs", "zero_leaves"]
)
def test_hooks_go_whatever_happens(tap):
    base = tiny_base("llama")
    name = base.layout.block(0).down
    open_tap = {
        "capture": lambda: capture(base.model, [name]),
        "stop_after": lambda: stop_after(base.model, name),
        "change_output": lambda: change_output(base.model, name, lambda y: y),
        "change_inputs": lambda: change_inputs(base.model, {name: lambda x: x}),
        "zero_leaves": lambda: zero_leaves(base.model, [name]),
    }[tap]
    with pytest.raises(KeyError), open_tap():
        raise KeyError
    assert not _hooks(base.model)
    with open_tap():
        assert _hooks(base.model)
    assert not _hooks(base.model)


def test_a_name_that_does_not_exist_leaves_no_hook_of_the_others():
    base = tiny_base("llama")
    names = [base.layout.block(0).down, "model.layers.9"]
    with pytest.raises(AttributeError, match="9"), capture(base.model, names):
        pass
    assert not _hooks(base.model)
