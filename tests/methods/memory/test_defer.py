"""DEFER: the gate and the copy, soft in training and hard afterwards."""

from __future__ import annotations

import pytest
import torch
from support import FAMILIES, REQUESTS, TEXT, tiny_base

from kedit_lightning.edits import Deferral, DeferralEdit
from kedit_lightning.edits.kinds.deferral.deferral_edit import stacked_deferral
from kedit_lightning.errors import EditFileError
from kedit_lightning.methods import DEFER
from kedit_lightning.methods.memory.defer import soft_output

OTHERS = [text.split(".")[0] for text in TEXT]
PROMPTS = [request.prompt for request in REQUESTS]


def defer(base, **settings):
    return DEFER(base_model=base, **{"steps": 10, "lr": 0.05, **settings})


def deferral(gate_bias, seed=0, zero=False):
    chance = torch.Generator().manual_seed(seed)
    change, bias = (
        torch.randn(*shape, generator=chance, dtype=torch.float64) for shape in ((4, 5), (4,))
    )
    scale = 0.0 if zero else 1.0
    gate = torch.zeros(5, dtype=torch.float64)
    return Deferral(gate, gate.new_tensor([gate_bias]), scale * change, scale * bias)


def answers(base):
    rows = base.rows(PROMPTS, [r.target_new for r in REQUESTS])
    return base.answer_logits(rows)


def test_the_gate_is_hard_and_one_half_is_open():
    queries = torch.zeros(1, 5, dtype=torch.float64)
    assert deferral(0.0).route(queries).tolist() == [True]
    assert deferral(-1e-9).route(queries).tolist() == [False]


def test_soft_and_hard_agree_where_the_gate_is_zero_or_one():
    x, y = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 4).double()
    for gate_bias in (-800.0, 800.0):
        parts = deferral(gate_bias)
        chosen = parts.route(x[:, 0])
        hard = parts.replace(x, y, chosen, torch.zeros(2, dtype=torch.long))
        torch.testing.assert_close(soft_output(parts, x[:, 0], x, y), hard, rtol=0, atol=1e-12)
    half = soft_output(deferral(0.0), x[:, 0], x, y)
    torch.testing.assert_close(half, (y + deferral(0.0).output(x, y)) / 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_gate_and_an_unchanged_copy_are_the_base_model(family):
    base = tiny_base(family, torch.float32)
    before = answers(base)
    edit = defer(base).edit(REQUESTS)
    closed = edit.share._replace(gate=0 * edit.share.gate, gate_bias=edit.share.gate_bias * 0 - 1)
    with DeferralEdit(base, edit.module, closed):
        assert torch.equal(answers(base), before)
    same = edit.share._replace(change=0 * edit.share.change, bias=0 * edit.share.bias)
    with DeferralEdit(base, edit.module, same):
        torch.testing.assert_close(answers(base), before)
    with edit:
        assert not torch.allclose(answers(base), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_decisions_do_not_depend_on_the_batch_padding_or_the_cache(family):
    base = tiny_base(family)
    prompts = [*OTHERS, *PROMPTS]
    plain = base.generate(prompts, max_new_tokens=4)
    method = defer(base)
    edit = method.edit(REQUESTS[:2])
    # A gate that is open for some rows and closed for others.
    gates = [float(edit.share.gate @ key) for key in keys_of(base, edit.module, prompts)]
    share = edit.share._replace(
        gate_bias=torch.tensor([-sorted(gates)[len(gates) // 2] + 1e-6]).double()
    )
    with DeferralEdit(base, edit.module, share):
        together = base.generate(prompts, max_new_tokens=4)
        assert together == base.generate(prompts, max_new_tokens=4, use_cache=False)
        assert together == [base.generate([p], max_new_tokens=4)[0] for p in prompts]
        logits = answers(base)
        base.padding_side = "left"
        torch.testing.assert_close(answers(base), logits, rtol=0, atol=1e-9)
    same = [one == other for one, other in zip(together, plain, strict=True)]
    assert any(same)
    assert not all(same)


def keys_of(base, module, prompts):
    rows, seen = base.rows(prompts), []
    handle = base.module(module).register_forward_hook(lambda m, args, y: seen.append(args[0]))
    base.forward(rows)
    handle.remove()
    return seen[0][torch.arange(len(prompts)), rows.prompt_end]


def test_later_edits_train_on_and_undoing_one_takes_out_its_share():
    base = tiny_base("llama")
    method = defer(base, steps=5)
    first = method.edit(REQUESTS[:1]).apply()
    second = method.edit(REQUESTS[1:2])
    assert second.origin.notes["steps"] == 5
    second.apply()
    whole = stacked_deferral(base, second.module)
    for part, one, two in zip(whole, first.share, second.share, strict=True):
        assert torch.equal(part, one + two)
    first.rollback()
    left = stacked_deferral(base, second.module)
    assert all(torch.equal(one, two) for one, two in zip(left, second.share, strict=True))
    second.rollback()
    assert stacked_deferral(base, second.module) is None


def test_training_lowers_the_loss_of_the_answers():
    base = tiny_base("gpt2")
    rows = base.rows(PROMPTS, [r.target_new for r in REQUESTS])
    before = float(base.answer_log_probs(rows).sum())
    with defer(base, steps=40).edit(REQUESTS):
        assert float(base.answer_log_probs(rows).sum()) > before + 5


def test_a_share_that_does_not_fit_is_refused():
    base = tiny_base("gpt2")
    edit = defer(base, steps=1).edit(REQUESTS[:1])
    tensors, values = edit.state()
    with pytest.raises(EditFileError, match="does not fit module"):
        DeferralEdit.from_state(base, edit.origin, {**tensors, "gate": tensors["bias"]}, values)
