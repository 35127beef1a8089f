"""MEMOIR: masks and their overlap, whose columns act, and what an edit leaves alone."""

from __future__ import annotations

import pytest
import torch
from support import FAMILIES, REQUESTS, TEXT, tiny_base

from kedit_lightning.edits import OverlapEdit
from kedit_lightning.edits.kinds.overlap.overlap_edit import residual_memory, residual_output
from kedit_lightning.edits.kinds.overlap.top_hash import feature_order, overlaps, top_hash
from kedit_lightning.errors import EditFileError, UnsupportedUseError
from kedit_lightning.methods import MEMOIR
from kedit_lightning.methods.memory.memoir import memoir_defaults

OTHERS = [text.split(".")[0] for text in TEXT]
PROMPTS = [request.prompt for request in REQUESTS]


def memoir(base, **settings):
    return MEMOIR(base_model=base, **{"steps": 6, "contexts": 0, "lr": 0.5, **settings})


def answers(base, requests=REQUESTS):
    rows = base.rows([r.prompt for r in requests], [r.target_new for r in requests])
    return base.answer_logits(rows)


# ---- masks


def test_a_mask_is_the_largest_features_at_their_places_in_the_permutation():
    order = torch.tensor([3, 1, 0, 2])
    features = torch.tensor([[0.1, -5.0, 2.0, 0.0], [1.0, 0.5, 0.2, -3.0]])
    masks = top_hash(features, 2, order)
    assert masks.int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert sorted(feature_order(9, 4).tolist()) == list(range(9))
    assert torch.equal(feature_order(9, 4), feature_order(9, 4))
    assert not torch.equal(feature_order(9, 4), feature_order(9, 5))


def test_overlap_is_the_common_share():
    queries = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    masks = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert overlaps(queries, masks).tolist() == [[0.5, 1.0, 0.0], [0.5, 0.0, 1.0]]


def test_the_output_gets_the_columns_of_the_mask_alone():
    x, y = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 4).double()
    change, masks = torch.randn(4, 5).double(), torch.rand(2, 5) < 0.5
    expected = torch.stack([y[i] + x[i] @ (change * masks[i]).T for i in range(2)])
    torch.testing.assert_close(residual_output(x, y, change, masks), expected)


# ---- what is written


def test_training_is_that_of_a_plain_loop_on_whole_passes():
    base = tiny_base("llama")
    method = memoir(base, steps=4, stop_loss=0.0)
    edit = method.edit([REQUESTS[0]])
    rows = base.rows([REQUESTS[0].prompt], [REQUESTS[0].target_new])
    end, answer = int(rows.prompt_end[0]), rows.answer_ids[0]
    change, mask = torch.zeros(32, 48, dtype=torch.float64), edit.masks[0]

    def add(hooked, args, output):
        moved = output.clone()
        moved[:, end:] = output[:, end:] + (args[0][:, end:] * mask) @ change.T
        return moved

    handle = base.module(edit.plan.module).register_forward_hook(add)
    for _ in range(4):
        change.requires_grad_()
        logits = base.model(**rows.inputs).logits[0, end : end + len(answer)]
        loss = torch.nn.functional.cross_entropy(logits, answer)
        (gradient,) = torch.autograd.grad(loss, change)
        change = change.detach() - 0.5 * gradient
    handle.remove()
    torch.testing.assert_close(edit.change, change, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_outside_the_masks_and_the_weights_stay_exactly_as_they_are(family):
    base = tiny_base(family, torch.float32)
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    method = memoir(base, active=5)
    first = method.edit(REQUESTS[:1])
    with first:
        before = residual_memory([first], torch.device("cpu")).change
        second = method.edit(REQUESTS[1:2])
        with second:
            after = residual_memory([first, second], torch.device("cpu")).change
            answers(base)
    assert int(second.masks.sum()) == 5
    assert torch.equal(after[:, ~second.masks[0]], before[:, ~second.masks[0]])
    assert not torch.equal(after, before)
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


# ---- who is answered


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_with_little_overlap_and_tokens_before_the_end_keep_every_bit(family, side):
    base = tiny_base(family, torch.float32)
    rows = base.rows([*OTHERS, *PROMPTS], padding_side=side)
    before = base.forward(rows).logits
    with memoir(base, threshold=0.95).edit(REQUESTS[:1]):
        after = base.forward(rows).logits
    changed = [not torch.equal(one, two) for one, two in zip(before, after, strict=True)]
    own = len(OTHERS)
    assert [number for number, moved in enumerate(changed) if moved] == [own]
    end = int(rows.prompt_end[own])
    assert torch.equal(before[own, :end], after[own, :end])


def test_the_fact_with_the_largest_overlap_answers_and_the_newest_of_equals():
    base = tiny_base("gpt2")
    method = memoir(base)
    edit = method.edit(REQUESTS)
    again = method.edit(REQUESTS[:1])
    memory = residual_memory([edit, again], torch.device("cpu"))
    rows = base.rows(PROMPTS)
    seen = {}
    handle = base.module(edit.plan.module).register_forward_hook(
        lambda module, args, output: seen.update(x=args[0])
    )
    base.forward(rows)
    handle.remove()
    keys = seen["x"][torch.arange(len(PROMPTS)), rows.prompt_end]
    assert memory.route(keys).tolist() == [len(REQUESTS), 1, 2, 3]
    far = torch.randn(
        1, keys.shape[1], dtype=keys.dtype, generator=torch.Generator().manual_seed(3)
    )
    assert memory.route(far).tolist() == [-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_decisions_do_not_depend_on_the_batch_padding_or_the_cache(family):
    base = tiny_base(family)
    prompts = [*OTHERS, *PROMPTS]
    plain = base.generate(prompts, max_new_tokens=4)
    with memoir(base, steps=15).edit(REQUESTS[:2]):
        together = base.generate(prompts, max_new_tokens=4)
        assert together == base.generate(prompts, max_new_tokens=4, use_cache=False)
        assert together == [base.generate([p], max_new_tokens=4)[0] for p in prompts]
        logits = answers(base)
        base.padding_side = "left"
        torch.testing.assert_close(answers(base), logits, rtol=0, atol=1e-9)
    assert together != plain


# ---- the stack


def test_undoing_one_edit_takes_out_its_share_alone():
    base = tiny_base("llama")
    method = memoir(base, steps=30, active=8)
    edits = [method.edit([request]).apply() for request in REQUESTS]
    before = residual_memory(edits, torch.device("cpu")).change
    edits[1].rollback()
    kept = [edits[0], edits[2], edits[3]]
    after = residual_memory(kept, torch.device("cpu")).change
    untouched = ~edits[1].masks[0]
    torch.testing.assert_close(after[:, untouched], before[:, untouched], rtol=0, atol=1e-12)
    without = answers(base)
    base.edits.clear()
    plain = answers(base)
    fresh = [OverlapEdit(base, e.plan, e.masks, e.values, e.centre).apply() for e in kept]
    assert torch.equal(answers(base), without), "not a function of the edits that are left"
    assert len(fresh) == 3
    base.edits.clear()
    torch.testing.assert_close(without[1], plain[1], rtol=0, atol=0)


# ---- refusals and defaults


def test_masks_and_values_that_do_not_fit_are_refused():
    base = tiny_base("gpt2")
    edit = memoir(base).edit(REQUESTS[:1])
    tensors, values = edit.state()
    with pytest.raises(EditFileError, match="does not fit module"):
        OverlapEdit.from_state(
            base, edit.origin, {**tensors, "values": tensors["values"][:, 1:]}, values
        )
    plan = {**values["plan"], "active": 0}
    with pytest.raises(EditFileError, match="cannot have 0 active features"):
        OverlapEdit.from_state(base, edit.origin, tensors, {**values, "plan": plan})
    with pytest.raises(UnsupportedUseError, match="has only 128 features"):
        memoir(base, active=129).edit(REQUESTS[:1])


def test_the_layer_leaves_a_block_above_and_two_in_seven_features_are_active():
    base = tiny_base("llama")
    assert memoir_defaults(base).layer == 2
    assert memoir_defaults(base).threshold == 0.6
    method = memoir(base)
    method.configure_model()
    assert method.settings.active == round(48 * 2 / 7)
