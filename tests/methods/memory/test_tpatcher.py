"""T-Patcher: patches fire on a mistake, are silent elsewhere, and are trained each for itself."""

from __future__ import annotations

import math

import pytest
import torch
from edit_kinds import neurons
from support import FAMILIES, REQUESTS, TEXT, tiny_base

from kedit_lightning import EditRequest
from kedit_lightning.base_models.taps import capture
from kedit_lightning.edits import NeuronsEdit
from kedit_lightning.edits.kinds.neurons.neurons import MLPPlace, Neurons
from kedit_lightning.methods import TPatcher
from kedit_lightning.methods.memory.shared.last_block import LastBlockPasses
from kedit_lightning.methods.memory.shared.query_memory import irrelevant_queries
from kedit_lightning.methods.memory.tpatcher.patch_losses import activation_loss, memory_loss
from kedit_lightning.methods.memory.tpatcher.patch_training import PatchMemory, initial_patches

QUICK = {"steps": 4, "irrelevant": 0}
PROMPTS = [text.split(".")[0] for text in TEXT]


def tpatcher(base, **settings):
    return TPatcher(base_model=base, **{**QUICK, **settings})


def place_of(base):
    block = base.layout.block(-1)
    return MLPPlace(block.projections[0], block.down)


def answer_logits(base, requests=REQUESTS):
    rows = base.rows([r.prompt for r in requests], [r.target_new for r in requests])
    return torch.where(rows.answer_mask[..., None], base.answer_logits(rows), 0)


# ---- the losses


def test_losses_by_hand():
    a = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert activation_loss(a).tolist() == pytest.approx([math.exp(-1), math.exp(2)])
    scores = torch.tensor([[0.5, -1.0, -7.0], [2.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    found = memory_loss(scores, a, margin=3.0, top=2)
    first = (math.exp(3.5) + math.exp(2) + math.exp(2.5) + math.exp(1)) / 2
    # One query is all the memory that the second patch has.
    assert found.tolist() == pytest.approx([first, math.exp(5) + math.exp(7)])
    assert memory_loss(scores[:, :0], a, margin=3.0, top=2).tolist() == [0, 0]


def test_a_patch_starts_by_firing_with_one_on_its_query():
    queries = torch.randn(3, 8, dtype=torch.float64)
    keys, biases, _ = initial_patches(queries, torch.zeros(3, 8))
    assert ((queries * keys).sum(1) + biases).tolist() == pytest.approx([1, 1, 1])


def test_a_patch_need_not_be_silent_on_a_query_that_is_its_own():
    queries = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    others = torch.tensor([[3.0, 4.0 + 1e-9], [1.0, 0.5]], dtype=torch.float64)
    mine = torch.tensor([[True, True], [True, False]])
    memory = PatchMemory.of(queries[:0], others, queries, mine, rounding=1e-6)
    assert memory.counts.tolist() == [[False, True], [True, False]]
    scores = memory.scores(queries, torch.zeros(2, dtype=torch.float64))
    assert scores.isfinite().tolist() == memory.counts.tolist()
    assert float(scores[0, 1]) == 5.0


# ---- where patches act


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_below_the_activation_pass_to_the_last_bit(family):
    base = tiny_base(family, torch.float32)
    place = place_of(base)
    rows = base.rows([REQUESTS[0].prompt, *PROMPTS])
    with capture(base.model, [place.reads]) as seen:
        before = base.forward(rows).logits
    key = seen.inputs[place.reads][0, rows.prompt_end[0]]
    products = (seen.inputs[place.reads] @ key).masked_fill(~rows.attention_mask.bool(), -torch.inf)
    # The bias lies between the second and the third largest product: it fires on two tokens.
    second, third = products.flatten().topk(3).values[1:]
    fires = products > (second + third) / 2
    patch = Neurons(key[None], -(second + third)[None] / 2, torch.ones(1, len(key)), key[None])
    with NeuronsEdit(base, {place: patch}):
        after = base.forward(rows).logits
    assert torch.equal((after != before).any(-1) & rows.attention_mask.bool(), fires)
    assert int(fires.sum()) == 2


def test_neurons_of_several_edits_add_up_and_leave_no_trace():
    base = tiny_base("llama")
    rows = base.rows(PROMPTS)
    first, second = neurons(base, seed=60), neurons(base, seed=70)
    plain = base.forward(rows).logits
    with second:
        alone = base.forward(rows).logits
    with base.edits.restored():
        first.apply()
        second.apply()
        both = base.forward(rows).logits
        first.rollback()
        assert torch.equal(base.forward(rows).logits, alone)
    assert not torch.equal(both, alone)
    assert torch.equal(base.forward(rows).logits, plain)
    (place,) = first.neurons
    joined = Neurons.joined([first.neurons[place], second.neurons[place]])
    with NeuronsEdit(base, {place: joined}):
        torch.testing.assert_close(base.forward(rows).logits, both, rtol=0, atol=1e-10)


# ---- passes through the last block


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_the_last_block_alone_gives_the_logits_of_whole_passes(family, stacked, monkeypatch):
    base = tiny_base(family)
    place = place_of(base)
    with base.edits.restored():
        if stacked:
            neurons(base, layer=-1).apply()
        fast = LastBlockPasses(base, place, REQUESTS)
        assert fast.apart
        monkeypatch.setattr(LastBlockPasses, "_unchanged", lambda self: ())
        whole = LastBlockPasses(base, place, REQUESTS)
        assert not whole.apart
        change = 3 * torch.randn(len(fast.row), base.layout.hidden_size, dtype=torch.float64)
        logits = whole.run(change)
        torch.testing.assert_close(fast.run(change), logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(fast.queries, whole.queries, rtol=0, atol=1e-10)
        assert not torch.allclose(logits, whole.logits, atol=1e-2)
        some = torch.tensor([4, 1])
        found = fast.select(some).run(change[some])
        torch.testing.assert_close(found, logits[some], rtol=0, atol=1e-10)
        # Of whole passes the same holds, since in the last block no change reaches another token.
        found = whole.select(some).run(change[some])
        torch.testing.assert_close(found, logits[some], rtol=0, atol=1e-10)


# ---- training


def test_a_patch_is_that_of_a_plain_training_loop():
    base, steps = tiny_base("llama"), 4
    request = EditRequest("Amber Falls lies in", "Italy", "Amber Falls")
    method = tpatcher(base, steps=steps, stop_loss=0.0)
    edit = method.edit([request])
    place = place_of(base)
    start = tpatcher(base, steps=0).edit([request]).neurons[place]
    rows = base.rows([request.prompt], [request.target_new])
    assert len(start) == int(rows.answer_mask.sum()), "all tokens are wrong"
    end = int(rows.prompt_end[0])
    for at, query in enumerate(start.queries):
        key, bias = (
            (query / query.square().sum()).requires_grad_(),
            torch.zeros((), dtype=torch.float64),
        )
        bias, value = bias.requires_grad_(), (start.values[at] / 10).clone().requires_grad_()
        memory = torch.cat([method.text, start.queries[[i for i in range(len(start)) if i != at]]])
        optimizer = torch.optim.Adam([key, bias, value], lr=0.01, weight_decay=0.01)
        for _ in range(steps):
            a = query @ key + bias

            def put(module, args, output, a=a, value=value, at=at):
                changed = output.clone()
                changed[0, end + at] += torch.relu(a) * 10 * value
                return changed

            handle = base.module(place.writes).register_forward_hook(put)
            nll = -base.answer_logits(rows)[0, at].log_softmax(-1)[rows.answer_ids[0, at]]
            handle.remove()
            scores = memory @ key + bias
            top = scores.topk(round(0.025 * len(method.text))).values
            silent = ((top + 3).exp() + (top - a + 3).exp()).mean()
            optimizer.zero_grad()
            (nll + (-a).exp() + 10 * silent).backward()
            optimizer.step()
        found = edit.neurons[place]
        torch.testing.assert_close(found.values[at], 10 * value.detach(), rtol=0, atol=1e-8)
        torch.testing.assert_close(found.keys[at], key.detach(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_examples_together_get_the_patches_they_get_alone(family):
    base = tiny_base(family)
    method = tpatcher(base, steps=20, stop_loss=2.0)
    together = list(method.edit_each([REQUESTS[:1], REQUESTS[1:3], REQUESTS[3:]]))
    alone = [method.edit(part) for part in (REQUESTS[:1], REQUESTS[1:3], REQUESTS[3:])]
    place = place_of(base)
    for one, other in zip(together, alone, strict=True):
        for name in ("keys", "biases", "values", "queries"):
            pair = getattr(one.neurons[place], name), getattr(other.neurons[place], name)
            torch.testing.assert_close(*pair, rtol=0, atol=1e-9)


def roomy(base, memory_weight=0.1):
    """T-Patcher with a memory of few tokens: thousands leave no room in 32 dimensions."""
    method = tpatcher(base, steps=150, memory_weight=memory_weight)
    method.configure_model()
    method._text = method.text[:8]
    return method


def written(base, requests=REQUESTS):
    """Whether all tokens of each answer are the likeliest."""
    rows = base.rows([r.prompt for r in requests], [r.target_new for r in requests])
    right = base.answer_logits(rows).argmax(-1) == rows.answer_ids
    return (right | ~rows.answer_mask).all(1).tolist()


def test_a_written_fact_costs_nothing_when_it_is_written_again():
    base = tiny_base("llama")
    method = roomy(base)
    first = method.edit(REQUESTS[:1])
    with first:
        assert written(base, REQUESTS[:1]) == [True]
        again = method.edit(REQUESTS[:1])
        before = answer_logits(base)
        with again:
            assert torch.equal(answer_logits(base), before)
    assert again.origin.notes["neurons"] == 0
    assert len(first.neurons[place_of(base)]) > 1


def test_any_edit_of_a_stream_may_go_and_the_others_answer_as_before():
    base = tiny_base("gpt2")
    method = roomy(base, memory_weight=3.0)
    requests = [REQUESTS[0], REQUESTS[2], REQUESTS[3]]
    with base.edits.restored():
        edits = [method.edit([request]).apply() for request in requests]
        together = answer_logits(base, requests)
        assert written(base, requests) == [True, True, True]
        edits[1].rollback()
        assert written(base, requests) == [True, False, True]
        rest = answer_logits(base, requests)
    # The second is silent on the first, which it knew; on the last one nobody could know.
    torch.testing.assert_close(rest[0], together[0], rtol=0, atol=1e-12)


def test_a_patch_is_quieter_on_prompts_that_it_has_nothing_to_do_with():
    base = tiny_base("llama")
    place = place_of(base)
    prompts = [["Rome is in the city of", "Lyon is in the city of"], [], []]
    queries, number = irrelevant_queries(base, place.reads, REQUESTS[:3], prompts)
    tokens = len(base.encode(REQUESTS[0].prompt, REQUESTS[0].target_new).answer)
    assert number.tolist() == [0] * 2 * tokens
    rows = base.rows(prompts[0], [REQUESTS[0].target_new] * 2)
    with capture(base.model, [place.reads]) as seen:
        base.forward(rows)
    inputs = seen.inputs[place.reads]
    torch.testing.assert_close(queries[0], inputs[0, rows.prompt_end[0]], rtol=0, atol=1e-12)
    highest = []
    for count in (0, 2):
        method = tpatcher(base, steps=20, irrelevant=count, memory_weight=1.0)
        method.configure_model()
        method._text = method.text[:8]
        method._background.of = lambda requests, count: [prompts[0][:count] for _ in requests]
        patch = method.edit(REQUESTS[:1]).neurons[place]
        highest.append(float((queries @ patch.keys.T + patch.biases).max()))
    assert highest[1] < highest[0] - 0.05


def test_a_correction_overrules_the_fact_before_it():
    base = tiny_base("llama")
    method = roomy(base)
    changed = [EditRequest(REQUESTS[0].prompt, "Berlin", "Eiffel Tower")]
    with method.edit(REQUESTS[:1]), method.edit(changed):
        assert written(base, changed) == [True]
