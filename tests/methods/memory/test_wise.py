"""WISE: masks, merging, the routing loss, and what its memories do to rows and to each other."""

from __future__ import annotations

import math

import pytest
import torch
from support import FAMILIES, REQUESTS, TEXT, tiny_base

from kedit_lightning import Edit, EditRequest
from kedit_lightning.base_models.taps import capture
from kedit_lightning.edits import SideEdit, SidePlan
from kedit_lightning.edits.kinds.side.merging import merge_shards, shard_mask, slerp
from kedit_lightning.edits.kinds.side.side_edit import shard_changes, side_memories
from kedit_lightning.errors import DataFileError, EditFileError
from kedit_lightning.methods import WISE
from kedit_lightning.methods.memory.shared.background import Background
from kedit_lightning.methods.memory.shared.memory_passes import step_rows
from kedit_lightning.methods.memory.wise import falling_rates, margin_loss, wise_defaults

OTHERS = [text.split(".")[0] for text in TEXT]
QUICK = {"steps": 6, "contexts": 0, "alpha": 0.5, "beta": 2.0, "gamma": 1.0}
PROMPTS = [request.prompt for request in REQUESTS]


def wise(base, **settings):
    return WISE(base_model=base, **{**QUICK, **settings})


def answers(base, requests=REQUESTS):
    rows = base.rows([r.prompt for r in requests], [r.target_new for r in requests])
    return base.answer_logits(rows)


def applied(base, method, requests=REQUESTS):
    """One edit a request, each computed on top of those before it, all applied."""
    return [method.edit([request]).apply() for request in requests]


# ---- masks and merging


def test_masks_have_their_share_and_overlap_as_independent_ones_do():
    one, other = (shard_mask((400, 300), 0.2, 7, shard) for shard in (0, 1))
    assert float(one.double().mean()) == pytest.approx(0.2, abs=0.01)
    assert float((one & other).double().mean()) == pytest.approx(0.04, abs=0.005)
    assert torch.equal(one, shard_mask((400, 300), 0.2, 7, 0))
    assert not torch.equal(one, shard_mask((400, 300), 0.2, 8, 0))


@pytest.mark.parametrize("how", ["ties", "dare_ties", "dare_linear", "linear", "sign", "slerp"])
def test_one_shard_is_itself_however_it_is_merged(how):
    shard = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(merge_shards([shard], how, 0.5, 0), shard)


@pytest.mark.parametrize(("how", "density"), [("ties", 1.0), ("ties", 0.6), ("sign", 0.1)])
def test_disjoint_shards_are_summed_unchanged(how, density):
    mask = torch.rand(20, 30) < 0.5
    one, other = torch.randn(2, 20, 30, dtype=torch.float64)
    one, other = one * mask, other * ~mask
    torch.testing.assert_close(merge_shards([one, other], how, density, 0), one + other)


def test_ties_averages_what_agrees_and_prunes_what_is_small():
    one = torch.tensor([[4.0, 3.0, 0.1, 1.0]])
    other = torch.tensor([[2.0, -5.0, 0.2, 1.0]])
    agreed = torch.tensor([[3.0, -5.0, 0.15, 1.0]])
    torch.testing.assert_close(merge_shards([one, other], "sign", 1.0, 0), agreed)
    assert merge_shards([one, other], "ties", 0.5, 0).tolist() == [[3.0, -5.0, 0.0, 0.0]]
    assert merge_shards([one, other], "linear", 1.0, 0).tolist()[0][:2] == [3.0, -1.0]


def test_dare_is_drawn_from_its_seed_and_from_nothing_else():
    shards = list(torch.randn(2, 30, 30, dtype=torch.float64))
    state = torch.get_rng_state()
    found = merge_shards(shards, "dare_linear", 0.5, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(merge_shards(shards, "dare_linear", 0.5, 3), found)
    assert not torch.equal(merge_shards(shards, "dare_linear", 0.5, 4), found)
    ratio = found / (shards[0] + shards[1])
    assert torch.isclose(ratio, torch.tensor(2.0).double()).any()  # kept entries are scaled up


def test_slerp_keeps_to_the_sphere_and_to_lines():
    one, other = torch.eye(2, dtype=torch.float64)
    half = slerp(one, other, 0.5)
    torch.testing.assert_close(half, torch.full((2,), math.sqrt(0.5), dtype=torch.float64))
    torch.testing.assert_close(slerp(one, 3 * one, 0.5), 2 * one)
    assert torch.equal(slerp(one, torch.zeros_like(one), 0.5), one / 2)


# ---- the loss


def test_margin_loss_is_zero_exactly_where_the_three_margins_hold():
    def loss(irrelevant, relevant):
        pair = (torch.tensor([[float(x)]]) for x in (relevant, irrelevant))
        return float(margin_loss(*pair, alpha=5, beta=20, gamma=10))

    assert loss(4, 21) == 0
    assert loss(6, 21) == 1
    assert loss(4, 19) == 1
    assert loss(5, 14.5) == 5.5 + 0.5


def test_steps_see_each_bare_prompt_and_all_contexts_in_turn():
    assert step_rows(2, 1, 5).tolist() == [0, 1]
    assert step_rows(2, 3, 0).tolist() == [0, 3, 1, 5]
    assert step_rows(2, 3, 1).tolist() == [0, 3, 2, 4]


@pytest.mark.parametrize(("decay", "irrelevant"), [(None, None), (True, 12)])
def test_training_is_that_of_a_plain_loop_on_whole_passes(decay, irrelevant):
    base = tiny_base("llama")
    given = {"decay": decay, "irrelevant": irrelevant}
    method = wise(base, steps=3, lr=0.5, stop_loss=0.0, mask_ratio=0.5, **given)
    edit = method.edit([REQUESTS[0]])
    rows = base.rows([REQUESTS[0].prompt], [REQUESTS[0].target_new])
    end, answer = int(rows.prompt_end[0]), rows.answer_ids[0]
    (prompts,) = Background(base, 0, samples=irrelevant or 8).of([REQUESTS[0]], irrelevant or 8)
    module = edit.plan.module
    with torch.no_grad(), capture(base.model, [module]) as seen:
        keys = []
        for prompt in prompts:
            single = base.rows([prompt])
            base.forward(single)
            keys.append(seen.inputs[module][0, int(single.prompt_end[0])])
    irrelevant, change = torch.stack(keys), torch.zeros(32, 48, dtype=torch.float64)
    mask = edit.plan.mask((32, 48), 0)

    def add(hooked, args, output):
        moved = output.clone()
        moved[:, end:] = output[:, end:] + args[0][:, end:] @ change.T
        return moved

    handle = base.module(module).register_forward_hook(add)
    for step in range(3):
        change.requires_grad_()
        logits = base.model(**rows.inputs).logits[0, end : end + len(answer)]
        nll = torch.nn.functional.cross_entropy(logits, answer)
        relevant = (edit.keys @ change.T).pow(2).sum(-1).clamp(min=1e-12).sqrt()
        others = (irrelevant @ change.T).pow(2).sum(-1).clamp(min=1e-12).sqrt()
        loss = nll + margin_loss(relevant[None], others[None], 0.5, 2.0, 1.0)
        (gradient,) = torch.autograd.grad(loss, change)
        rate = 0.5 * (1 - step / 3) if decay else 0.5
        change = (change.detach() - rate * gradient * mask).clamp(-1, 1)
    handle.remove()
    torch.testing.assert_close(edit.change, change, rtol=0, atol=1e-9)


def test_a_falling_rate_starts_at_that_of_each_fact():
    assert falling_rates(0.5, facts=20, steps=4) == [10.0, 7.5, 5.0, 2.5]


# ---- what it leaves alone


@pytest.mark.parametrize("family", FAMILIES)
def test_main_memory_and_unmasked_entries_stay_exactly_as_they_are(family):
    base = tiny_base(family, torch.float32)
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    edit = wise(base, lr=0.5).edit(REQUESTS)
    with edit:
        answers(base)
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    change = edit.change
    mask = edit.plan.mask(tuple(change.shape), edit.shard)
    assert not bool(change[~mask].any())
    assert bool(change[mask].any())


def test_entries_stay_within_the_norm_constraint():
    base = tiny_base("gpt2")
    edits = applied(base, wise(base, lr=5.0, norm_constraint=0.01), REQUESTS[:2])
    total = shard_changes(edits)[0]
    assert float(total.abs().max()) == pytest.approx(0.01)
    base.edits.clear()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_below_the_threshold_and_tokens_before_the_end_keep_every_bit(family, side):
    base = tiny_base(family, torch.float32)
    rows = base.rows([*OTHERS, *PROMPTS], padding_side=side)
    before = base.forward(rows).logits
    method = wise(base, activation_ratio=1.0, beta=50.0, lr=0.2)
    with method.edit(REQUESTS[:1]):
        after = base.forward(rows).logits
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert not same[len(OTHERS)]
    assert any(same)
    end = int(rows.prompt_end[len(OTHERS)])
    assert torch.equal(before[len(OTHERS), :end], after[len(OTHERS), :end])


def test_a_memory_that_never_answers_leaves_the_base_model():
    base = tiny_base("llama", torch.float32)
    before = answers(base)
    edit = wise(base).edit(REQUESTS)
    closed = SidePlan(**{**vars(edit.plan), "activation_ratio": 1e9})
    silent = SideEdit(base, closed, edit.shard, edit.values, edit.keys)
    with silent:
        assert torch.equal(answers(base), before)


# ---- decisions


@pytest.mark.parametrize("family", FAMILIES)
def test_decisions_do_not_depend_on_the_batch_padding_or_the_cache(family):
    base = tiny_base(family)
    prompts = [*OTHERS, *PROMPTS]
    plain = base.generate(prompts, max_new_tokens=4)
    with wise(base, lr=0.5, steps=15).edit(REQUESTS[:2]):
        together = base.generate(prompts, max_new_tokens=4)
        assert together == base.generate(prompts, max_new_tokens=4, use_cache=False)
        assert together == [base.generate([p], max_new_tokens=4)[0] for p in prompts]
        logits = answers(base)
        alone = [answers(base, [request]) for request in REQUESTS]
        base.padding_side = "left"
        torch.testing.assert_close(answers(base), logits, rtol=0, atol=1e-9)
        for row, (single, request) in enumerate(zip(alone, REQUESTS, strict=True)):
            width = single.shape[1]
            torch.testing.assert_close(
                single[0], logits[row, :width], rtol=0, atol=1e-9, msg=request.prompt
            )
    assert together != plain


def test_of_several_memories_the_one_with_the_largest_activation_answers():
    base = tiny_base("gpt2")
    method = wise(base, lr=0.5, shard_size=1, shards_per_memory=1)
    edits = applied(base, method)
    memories = side_memories(method.plan, edits, torch.device("cpu"))
    assert len(memories.changes) == len(REQUESTS)
    for number, edit in enumerate(edits):
        single = side_memories(method.plan, [edit], torch.device("cpu"))
        torch.testing.assert_close(memories.changes[number], edit.change)
        assert single.route(edit.keys).tolist() == [0]
        scores = (memories.changes @ edit.keys[0]).norm(dim=-1)
        passing = scores > memories.thresholds
        best = int(scores.masked_fill(~passing, -1).argmax())
        assert memories.route(edit.keys).tolist() == [best]
    base.edits.clear()


# ---- the stack


def test_facts_fill_shards_and_shards_fill_memories():
    base = tiny_base("gpt2")
    edits = applied(base, wise(base, shard_size=2, shards_per_memory=1, steps=1))
    assert [edit.shard for edit in edits] == [0, 0, 1, 1]
    memories = side_memories(edits[0].plan, edits, torch.device("cpu"))
    assert len(memories.changes) == 2
    torch.testing.assert_close(memories.changes[0], edits[0].change + edits[1].change)
    base.edits.clear()
    merged = applied(base, wise(base, shard_size=2, retrieve=False, steps=1))
    assert len(side_memories(merged[0].plan, merged, torch.device("cpu")).changes) == 1
    base.edits.clear()


@pytest.mark.parametrize("shard_size", [1, 500])
def test_undoing_one_edit_leaves_the_memory_of_the_others(shard_size):
    base = tiny_base("llama")
    method = wise(base, lr=0.5, steps=25, shard_size=shard_size, shards_per_memory=1)
    edits = applied(base, method)
    written = answers(base)
    keys = torch.cat([edit.keys for edit in edits])
    answered = side_memories(method.plan, edits, keys.device).route(keys).tolist()
    edits[1].rollback()
    without = answers(base)
    kept = [edit for number, edit in enumerate(edits) if number != 1]
    base.edits.clear()
    fresh = [SideEdit(base, e.plan, e.shard, e.values, e.keys).apply() for e in kept]
    assert torch.equal(answers(base), without), "not a function of the edits that are left"
    for edit in fresh:
        edit.rollback()
    if shard_size == 1:  # memories of their own: what others say does not change
        others = [row for row, memory in enumerate(answered) if memory != 1]
        assert len(others) > 1
        for row in others:
            torch.testing.assert_close(without[row], written[row], rtol=0, atol=1e-9)


def test_earlier_facts_of_a_shard_are_replayed():
    base = tiny_base("gpt2")
    first = wise(base).edit(REQUESTS[:2])
    with first:
        method = wise(base, replay=1)
        method.configure_model()
        shard = method._shard([REQUESTS[2]])
        assert shard.number == 0
        torch.testing.assert_close(shard.start, first.change)
        assert len(shard.earlier) == 1
        assert shard.earlier[0] in first.origin.requests
        edit = method.edit([REQUESTS[2]])
        assert len(edit.keys) == 1
        assert not torch.equal(edit.values, wise(base).edit([REQUESTS[2]]).values)


# ---- irrelevant prompts


def test_irrelevant_prompts_are_of_others_and_depend_on_the_request_alone(tmp_path):
    base = tiny_base("llama")
    alone = Background(base, 0).of([REQUESTS[0]], 8)[0]
    together = Background(base, 0).of(REQUESTS, 8)
    assert alone == together[0]
    assert [len(own) for own in together] == [8] * len(REQUESTS)
    assert not {prompt for own in together for prompt in own} & set(PROMPTS)
    near = [prompt for prompt in alone if prompt.endswith(" is in the city of")]
    assert near
    assert all(prompt.startswith("The ") for prompt in near)
    path = tmp_path / "prompts.txt"
    path.write_text("One\n\nTwo\n")
    given = Background(base, 0, str(path)).of([EditRequest("Rome is in", "Peru")], 2)
    assert set(given[0]) == {"One", "Two"}
    path.write_text("\n")
    with pytest.raises(DataFileError, match="holds no irrelevant prompts"):
        Background(base, 0, str(path))


# ---- files and models


def test_a_file_whose_values_do_not_fit_the_mask_is_refused():
    base = tiny_base("gpt2")
    edit = wise(base, steps=1).edit(REQUESTS[:1])
    tensors, values = edit.state()
    with pytest.raises(EditFileError, match="in the mask"):
        Edit._kinds["side"].from_state(
            base, edit.origin, {**tensors, "values": tensors["values"][1:]}, values
        )
    plan = {**values["plan"], "density": 0.0}
    with pytest.raises(EditFileError, match="cannot have the plan"):
        SideEdit.from_state(base, edit.origin, tensors, {**values, "plan": plan})


def test_the_layer_is_the_published_one_or_leaves_a_block_above():
    assert wise_defaults(tiny_base("gpt2")).layer == 2
    method = wise(tiny_base("gpt2"), layer=-2)
    method.configure_model()
    assert method.plan.module == "transformer.h.2.mlp.c_proj"
