"""SERAC: routing, answers, learning, checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from serac_support import ANSWERS, FAR, PROMPTS, asked, each_family, logits, serac
from support import REQUESTS, tiny_base

from kedit_lightning import Edit, EditRequest
from kedit_lightning.edits import ScopeEdit, ScopeEntry
from kedit_lightning.edits.effects import ReadStates
from kedit_lightning.edits.kinds.scope.scope_networks import ScopeNetworks, ScopePlan
from kedit_lightning.errors import (
    UnsupportedUseError,
)
from kedit_lightning.methods import SERAC


def reference(base, edit, prompt, answer, number=0):
    """Logits of the counterfactual model for one question asked alone. ``[width, vocab]``"""
    row = base.encode(prompt, answer)
    question = asked(base, prompt)
    statement = edit.entries[number].statement
    ids = torch.tensor([[*statement, *question, *row.answer]])
    embedding = base.model.get_input_embeddings().weight
    states = edit.networks.answer_states(ids, embedding)
    first = len(statement) + len(question) - 1
    return edit.networks.logits(states, embedding)[0, first : first + len(row.answer)]


# ---- routing


def memory(base, keys, **fields):
    plan = ScopePlan(base.layout.block(1).name, 32, keys.shape[1], 32, 1, 1.0)
    networks = ScopeNetworks(plan, dtype=keys.dtype)
    edits = [ScopeEdit(base, networks, [ScopeEntry(k, (5,), **fields)]) for k in keys]
    with base.edits.restored():
        for edit in edits:
            edit.apply()
        states = base.edits.effects(ReadStates)
    return states[0].build([effect.content for effect in states], None)


def test_the_switch_stands_at_a_distance_of_the_root_of_ln_2():  # SERAC-2
    at = memory(tiny_base("llama"), torch.zeros(1, 3, dtype=torch.float64))
    edge = math.sqrt(math.log(2))
    questions = torch.zeros(3, 3, dtype=torch.float64)
    questions[:, 1] = torch.tensor([0.0, edge - 1e-9, edge + 1e-9], dtype=torch.float64)
    assert at.route(questions).tolist() == [0, 0, -1]


def test_mixed_precision_changes_no_key():
    networks = ScopeNetworks(ScopePlan("block", 32, 8, 32, 1, 1.0))
    hidden, mask = torch.randn(3, 5, 32), torch.ones(3, 5)
    with torch.no_grad():
        wanted = networks.embed(hidden, mask)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(networks.embed(hidden, mask), wanted)


def test_each_entry_keeps_its_own_threshold():
    at = memory(tiny_base("llama"), torch.zeros(1, 3, dtype=torch.float64), threshold=0.9)
    questions = torch.full((1, 3), 0.3, dtype=torch.float64)  # similarity exp(-0.27) = 0.76
    assert at.route(questions).tolist() == [-1]


def test_the_nearest_entry_answers_and_of_equal_ones_the_newest():
    keys = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.5, 0.0], [9.0, 9.0]], dtype=torch.float64)
    questions = torch.tensor([[0.1, 0.0], [0.4, 0.0], [5.0, 0.0]], dtype=torch.float64)
    assert memory(tiny_base("llama"), keys).route(questions).tolist() == [0, 2, -1]


def test_rounding_does_not_bring_an_older_answer_back():
    """As another batch size, or another machine, moves the key of a prompt by some last digits."""
    keys = torch.tensor([[1.0, 2.0], [1.0, 2.0 + 4e-6], [1.2, 2.0]])
    questions = torch.tensor([[1.0, 2.0], [0.9, 1.9], [1.2, 2.0], [1.0, 2.0 + 4e-6]])
    base = tiny_base("llama", torch.float32)
    assert memory(base, keys).route(questions).tolist() == [1, 1, 2, 1]


# ---- answers


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_in_scope_get_the_other_model_and_the_rest_stay_bit_for_bit(family, side):  # SERAC-1
    base = tiny_base(family)
    before, rows = logits(base, side=side)
    edit = serac(base).edit(REQUESTS[:2])
    with edit:
        after, _ = logits(base, side=side)
    for row, prompt in enumerate((*PROMPTS, *FAR)):
        if row >= 2:
            assert torch.equal(after[row], before[row]), prompt
            continue
        wanted = reference(base, edit, prompt, ANSWERS[row], row)
        found = after[row][rows.answer_mask[row]]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        assert not torch.allclose(found, before[row][rows.answer_mask[row]], atol=1e-2)


@each_family
def test_all_ways_of_asking_for_logits_agree(family):
    base = tiny_base(family)
    with serac(base).edit(REQUESTS[:1]):
        found, rows = logits(base)
        whole = base.forward(rows).logits
        at = torch.arange(len(rows))[:, None]
        torch.testing.assert_close(whole[at, rows.answer_columns], found, rtol=0, atol=1e-6)
        last = base.forward(base.rows(PROMPTS, padding_side="left"), logits_to_keep=1).logits
        torch.testing.assert_close(last[:, 0], found[: len(PROMPTS), 0], rtol=0, atol=1e-6)
        inside = whole[0, : int(rows.prompt_end[0])]
    assert torch.equal(inside, base.forward(rows).logits[0, : int(rows.prompt_end[0])])


@each_family
@pytest.mark.parametrize("cache", [True, False])
def test_generation_follows_the_other_model_token_by_token(family, cache):
    base = tiny_base(family)
    edit = serac(base).edit(REQUESTS[:1])
    plain = base.generate([*PROMPTS, *FAR], max_new_tokens=6)
    embedding = base.model.get_input_embeddings().weight
    ids = [*edit.entries[0].statement, *asked(base, PROMPTS[0])]
    start = len(ids)
    for _ in range(6):
        states = edit.networks.answer_states(torch.tensor([ids]), embedding)
        ids.append(int(edit.networks.logits(states, embedding)[0, -1].argmax()))
        if ids[-1] == base.tokenizer.eos_token_id:
            break
    wanted = base.tokenizer.decode(ids[start:], skip_special_tokens=True)
    with edit:
        texts = base.generate([*PROMPTS, *FAR], max_new_tokens=6, use_cache=cache)
        alone = base.generate([PROMPTS[0]], max_new_tokens=6, use_cache=cache)
        beams = [
            base.generate([*some, PROMPTS[0]], max_new_tokens=6, num_beams=3, use_cache=cache)[-1]
            for some in ([], [*FAR])
        ]
    assert texts == [wanted, *plain[1:]]
    assert alone == [wanted]
    assert wanted != plain[0]
    assert beams[0] == beams[1]


def test_an_encoder_that_ran_before_the_edit_leaves_no_trace():
    base = tiny_base("t5")
    rows = base.rows(PROMPTS, ANSWERS[: len(PROMPTS)])
    read = base.model.get_encoder()(rows.inputs["input_ids"], rows.attention_mask)
    inputs = {k: v for k, v in rows.inputs.items() if k != "input_ids"}
    before = base.model(encoder_outputs=read, **inputs).logits
    with serac(base).edit(REQUESTS):
        assert torch.equal(base.model(encoder_outputs=read, **inputs).logits, before)
        again = base.model.get_encoder()(rows.inputs["input_ids"], rows.attention_mask)
        found = base.model(encoder_outputs=again, **inputs).logits
        torch.testing.assert_close(found, base.forward(rows).logits, rtol=0, atol=1e-6)
    assert not torch.equal(found, before)


def test_what_was_decided_for_one_edit_means_nothing_to_another():
    base = tiny_base("t5")
    rows = base.rows([PROMPTS[0]] * 2, ANSWERS[:2])
    inputs = {k: v for k, v in rows.inputs.items() if k != "input_ids"}
    method = serac(base)
    first, second = (method.edit([request]) for request in REQUESTS[:2])
    with first:
        read = base.model.get_encoder()(rows.inputs["input_ids"], rows.attention_mask)
        edited = base.model(encoder_outputs=read, **inputs).logits
    plain = base.forward(rows).logits
    with second:
        assert torch.equal(base.model(encoder_outputs=read, **inputs).logits, plain)
    assert not torch.equal(edited, plain)


@each_family
def test_the_other_model_reads_what_each_beam_has_written(family):
    base = tiny_base(family)
    rows = base.rows([*PROMPTS, *FAR], padding_side="left")
    options = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 4, "do_sample": False}
    told = {"return_dict_in_generate": True, "output_scores": True}
    found = {}
    with serac(base).edit(REQUESTS), base.edits.prompts_end_at(rows.prompt_end):
        for cached in (True, False):  # without a cache the model is given all tokens at each step
            found[cached] = base.model.generate(**rows.inputs, use_cache=cached, **options, **told)
    assert torch.equal(found[True].sequences, found[False].sequences)
    torch.testing.assert_close(
        found[True].sequences_scores, found[False].sequences_scores, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_edits_form_one_memory_that_rolls_back_entry_by_entry(family):
    base = tiny_base(family)
    method = serac(base)
    before, _ = logits(base)
    edits = [method.edit([request]) for request in REQUESTS]
    with base.edits.restored():
        seen = [before]
        for edit in edits:
            if edit is edits[0]:
                edit.apply()
            else:
                with pytest.warns(UserWarning, match="on top of"):
                    edit.apply()
            seen.append(logits(base)[0])
        for number, edit in reversed(list(enumerate(edits))):
            edit.rollback()
            assert torch.equal(logits(base)[0], seen[number])
    together = method.edit(REQUESTS)
    with together:
        torch.testing.assert_close(logits(base)[0], seen[-1], rtol=0, atol=1e-6)


def test_of_two_edits_of_a_prompt_the_newer_answers():
    base = tiny_base("llama")
    method = serac(base)
    other = EditRequest(PROMPTS[0], "Norway")
    first = method.edit(REQUESTS[:1]).apply()
    second = method.edit([other]).apply()
    found = logits(base)[0]
    first.rollback()
    torch.testing.assert_close(logits(base)[0], found, rtol=0, atol=1e-9)
    second.rollback()
    assert not torch.equal(logits(base)[0], found)


def test_memories_with_other_networks_stay_apart():
    base = tiny_base("llama")
    old, new = (serac(base, seed=seed).edit([REQUESTS[i]]) for i, seed in ((0, 0), (1, 7)))
    found = {}
    for edit in (old, new):
        with edit:
            found[edit.id] = logits(base)[0]
    with old, pytest.warns(UserWarning, match="on top of"), new:
        both = logits(base)[0]
    assert torch.equal(both[0], found[old.id][0])
    assert torch.equal(both[1], found[new.id][1])


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_rows_can_carry_an_edit_each(family):
    base = tiny_base(family)
    method = serac(base)
    edits = [method.edit([request]) for request in REQUESTS[:2]]
    prompts, answers = [PROMPTS[0]] * 3 + [PROMPTS[1]] * 2, ["Rome"] * 3 + ["Berlin"] * 2
    plain = logits(base, prompts, answers)[0]
    carried = [edits[0], edits[1], None, edits[1], edits[0]]
    with base.edits.carried(carried):
        found = logits(base, prompts, answers)[0]
        texts = base.generate(prompts, max_new_tokens=4)
    own = []
    for edit in edits:
        with edit:
            own.append(logits(base, prompts, answers)[0])
    with edits[0]:
        assert texts[0] == base.generate([PROMPTS[0]], max_new_tokens=4)[0]
    assert texts[1] == texts[2] == base.generate([PROMPTS[0]], max_new_tokens=4)[0]
    assert torch.equal(found[[1, 2, 4]], plain[[1, 2, 4]])
    torch.testing.assert_close(found[0], own[0][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[3], own[1][3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_later_training_changes_no_edit(family, tmp_path):
    base = tiny_base(family)
    method = serac(base)
    edit = method.edit(REQUESTS[:1])
    with edit:
        before = logits(base)[0]
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(0.1)
    with edit:
        assert torch.equal(logits(base)[0], before)
    path = edit.save(tmp_path / "edit.safetensors")
    with Edit.load(path, base) as loaded:
        assert torch.equal(logits(base)[0], before)
    assert loaded.id == edit.id
    assert method.edit(REQUESTS[:1]).id != edit.id


def test_calls_that_cannot_be_answered_are_refused():
    base = tiny_base("llama")
    rows = base.rows(PROMPTS[:1])
    ids = rows.inputs["input_ids"]
    with serac(base).edit(REQUESTS[:1]):
        embedded = base.model.get_input_embeddings()(ids)
        for options in ({}, {"attention_mask": rows.attention_mask}):
            with pytest.raises(UnsupportedUseError, match="input_ids"):
                base.model(inputs_embeds=embedded, **options)
        with pytest.raises(UnsupportedUseError, match="loss"):
            base.model(input_ids=ids, labels=ids)
    base = tiny_base("t5")
    with base.edits.restored():
        serac(base).edit(REQUESTS[:1]).apply()
        embedded = base.model.get_input_embeddings()(base.rows(PROMPTS[:1]).inputs["input_ids"])
        with pytest.raises(UnsupportedUseError, match="input_ids"):
            base.model(inputs_embeds=embedded, decoder_input_ids=torch.tensor([[0]]))
        with pytest.raises(UnsupportedUseError, match="input_ids"):
            base.model.generate(inputs_embeds=embedded, max_new_tokens=2)
    with pytest.raises(UnsupportedUseError, match="threshold must lie between 0 and 1, got 2"):
        serac(base, threshold=2.0).edit(REQUESTS[:1])


def test_editing_with_untrained_networks_warns_and_says_how_to_fit():
    with pytest.warns(UserWarning, match="kedit fit -c methods/serac"):
        SERAC(tiny_base("llama")).edit(REQUESTS[:1])
