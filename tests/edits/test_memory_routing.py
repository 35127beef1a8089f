"""Memory edits decide per row at the end of the prompt, and keep to it for the whole answer."""

from __future__ import annotations

import copy
import gc
import weakref

import edit_kinds
import pytest
import torch
from edit_kinds import ANSWERS, KINDS, PROMPTS, answers, last_key, low_rank
from support import tiny_base

from kedit_lightning import BaseModel
from kedit_lightning.base_models.taps import capture
from kedit_lightning.edits import CodebookEdit
from kedit_lightning.edits.kinds.codebook.codebook import Codebook, CodebookEntry, Replacement
from kedit_lightning.errors import UnsupportedUseError

#: Absolute positions; rotary and BOS; MLPs on flattened rows; encoder-decoder.
FAMILIES = ("gpt2", "llama", "opt", "t5")
#: Neither the longest nor the shortest of those below, so that it is padded on either side.
HIT, MISS = PROMPTS[1], PROMPTS[0]
REPLACEMENTS = ("last", "prompt", "all")


@pytest.fixture
def lookups(monkeypatch):
    """Rows of every decision that is taken."""
    seen: list[int] = []
    original = Codebook.lookup

    def spy(self, queries):
        seen.append(len(queries))
        return original(self, queries)

    monkeypatch.setattr(Codebook, "lookup", spy)
    return seen


#: A prompt that is recognised, and some that are not, of other lengths.
ROWS = [MISS, HIT, PROMPTS[2], "x"]


def codebook(base: BaseModel, prompt: str = HIT, replacement: Replacement = "last", layer: int = 1):
    """An edit that recognises one prompt."""
    return edit_kinds.codebook(base, prompt, replacement, layer=layer)


def _next_logits(base: BaseModel, prompts, padding_side="right"):
    """Logits after each prompt, by a plain call of the model."""
    rows = base.rows(prompts, padding_side=padding_side)
    with torch.no_grad():
        logits = base.model(**rows.inputs).logits
    return logits[torch.arange(len(rows)), rows.prompt_end]


def _texts(base: BaseModel, prompts, **options):
    return base.generate(prompts, max_new_tokens=6, **options)


def _ids(base: BaseModel, prompts, **options):
    """What the user gets from the model's own ``generate``."""
    rows = base.rows(prompts, padding_side="left")
    inputs = {name: rows.inputs[name] for name in ("input_ids", "attention_mask")}
    start = 1 if base.is_encoder_decoder else rows.inputs["input_ids"].shape[1]
    ids = base.model.generate(
        **inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, **options
    )
    return base.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)


# ---- which rows, and which of their tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recognised_row_gets_the_value_and_the_others_keep_every_bit(family):
    base = tiny_base(family)
    prompts = ROWS
    before = _next_logits(base, prompts)
    edit = codebook(base)
    (entry,) = edit.entries
    rows = base.rows(prompts)
    with edit:
        after = _next_logits(base, prompts)
        with capture(base.model, [edit.module]) as seen:
            base.forward(rows)
        outputs = seen.outputs[edit.module]
    for row, prompt in enumerate(prompts):
        assert torch.equal(after[row], before[row]) == (prompt != HIT)
        value = outputs[row, rows.prompt_end[row]]
        assert torch.equal(value, entry.value) == (prompt == HIT)


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_which_tokens_of_a_recognised_row_get_the_value(replacement):
    base = tiny_base("gpt2")
    edit = codebook(base, HIT, replacement)
    rows = base.rows([HIT], ["Rome, Italy"])
    end, length = int(rows.prompt_end[0]), rows.inputs["input_ids"].shape[1]
    assert length > end + 2
    wanted = {"last": [end], "prompt": range(end + 1), "all": range(length)}[replacement]
    with edit, capture(base.model, [edit.module]) as seen:
        base.forward(rows)
    changed = (seen.outputs[edit.module][0] == edit.entries[0].value).all(-1)
    assert changed.nonzero()[:, 0].tolist() == list(wanted)


def test_the_prompt_of_a_decoder_with_an_encoder_is_its_start_token():
    base = tiny_base("t5")
    rows = base.rows([HIT, MISS], ["Rome, Italy", "Berlin"])
    before = base.model(**rows.inputs).logits
    with codebook(base):
        after = base.model(**rows.inputs).logits
        torch.testing.assert_close(after, base.forward(rows).logits)
        alone = base.rows([HIT], ["Rome, Italy"])
        torch.testing.assert_close(base.model(**alone.inputs).logits, base.forward(alone).logits)
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_decision(family, side):
    base = tiny_base(family)
    with codebook(base, replacement="prompt"):
        alone = torch.cat([_next_logits(base, [prompt]) for prompt in ROWS])
        together = _next_logits(base, ROWS, side)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_radii_and_stack_order_decide_between_edits():
    base = tiny_base("llama")
    module = base.layout.block(1).down
    key = last_key(base, HIT, module)
    step = torch.nn.functional.normalize(torch.ones_like(key), dim=0)
    values = [torch.full((32,), float(v), dtype=torch.float64) for v in (1, 2)]
    first = CodebookEdit(base, module, [CodebookEntry(key + 0.6 * step, values[0], (1,), 1.0)])
    second = CodebookEdit(base, module, [CodebookEntry(key, values[1], (2,), 1.0)])
    beyond = CodebookEdit(base, module, [CodebookEntry(key + 1.6 * step, values[1], (2,), 1.0)])

    def output():
        rows = base.rows([HIT])
        with capture(base.model, [module]) as seen:
            base.forward(rows)
        return seen.outputs[module][0, rows.prompt_end[0]]

    plain = output()
    with first:
        assert torch.equal(output(), values[0])
        with second:  # splits the first one's ball
            assert torch.equal(output(), values[1])
        assert torch.equal(output(), values[0])
        with beyond:  # halves the first one's ball, from the other side
            assert torch.equal(output(), plain)
        assert torch.equal(output(), values[0]), "the neighbour has not got its radius back"
    with second:
        assert torch.equal(output(), values[1])
    assert torch.equal(output(), plain)


# ---- answers that are written token by token


@pytest.mark.parametrize("replacement", REPLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_decision_is_taken_once_and_kept_for_the_answer(family, replacement, lookups):
    base = tiny_base(family)
    prompts = ROWS
    before = _texts(base, prompts)
    with codebook(base, replacement=replacement):
        lookups.clear()
        cached = _texts(base, prompts)
        assert lookups == [len(prompts)], "decided anew in a decode step"
        # Without a cache everything is computed again at each step, from the same decision.
        assert _texts(base, prompts, use_cache=False) == cached
    changed = [text != old for text, old in zip(cached, before, strict=True)]
    assert changed == [prompt == HIT for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_generate_decides_alike(family):
    base = tiny_base(family)
    prompts = ROWS
    with codebook(base, replacement="all"):
        assert _ids(base, prompts) == _texts(base, prompts)
        assert _ids(base, [HIT]) == _texts(base, [HIT])


def test_one_token_prompts_are_prompts(lookups):
    base = tiny_base("gpt2")  # no beginning-of-sequence token
    assert base.rows(["x"]).inputs["input_ids"].shape == (1, 1)
    before = _texts(base, ["x", "y"])
    with codebook(base, "x"):
        lookups.clear()
        after = _texts(base, ["x", "y"])
        assert _texts(base, ["x"]) == after[:1]
        assert _ids(base, ["x", "y"]) == after
        assert lookups == [2, 1, 2]
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_a_decode_step_that_looks_like_a_key_is_no_hit():
    base = tiny_base("gpt2")
    rows = base.rows([MISS])
    module = base.layout.block(1).down
    with torch.no_grad(), capture(base.model, [module]) as seen:
        prefill = base.model(**rows.inputs, use_cache=True)
        token = prefill.logits[:, -1].argmax(-1, keepdim=True)
        step = base.model(input_ids=token, past_key_values=prefill.past_key_values)
        key = seen.inputs[module][0, -1]
    before = _texts(base, [MISS])
    value = torch.full((32,), 9.0, dtype=torch.float64)
    with (
        CodebookEdit(base, module, [CodebookEntry(key, value, (1,), 1e-3)], "all"),
        torch.no_grad(),
    ):
        prefill = base.model(**rows.inputs, use_cache=True)
        again = base.model(input_ids=token, past_key_values=prefill.past_key_values)
        assert torch.equal(again.logits, step.logits)
        assert _texts(base, [MISS]) == before


@pytest.mark.parametrize("replacement", REPLACEMENTS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_teacher_forcing_and_decoding_agree(family, replacement):
    base = tiny_base(family)
    with codebook(base, replacement=replacement), torch.no_grad():
        rows = base.rows([HIT, MISS], ANSWERS[:2])
        forced = base.answer_logits(rows)
        for row, prompt in enumerate([HIT, MISS]):
            answer = rows.answer_ids[row][rows.answer_mask[row]]
            output = base.model(**base.rows([prompt]).inputs, use_cache=True)
            steps = [output.logits[0, -1]]
            for token in answer[:-1]:
                output = base.model(
                    input_ids=token[None, None], past_key_values=output.past_key_values
                )
                steps.append(output.logits[0, -1])
            torch.testing.assert_close(
                torch.stack(steps), forced[row, : len(answer)], rtol=0, atol=1e-9
            )


# ---- beams, copies and turns


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("replacement", ["last", "all"])
def test_beam_search_is_the_same_with_and_without_a_cache(family, replacement):
    base = tiny_base(family)
    prompts = [MISS, HIT]
    options = {"num_beams": 3, "num_return_sequences": 2}
    before = _texts(base, prompts, **options)
    with codebook(base, replacement=replacement):
        cached = _texts(base, prompts, **options)
        assert _texts(base, prompts, **options, use_cache=False) == cached
        assert _ids(base, prompts, **options) == cached
    assert cached[:2] == before[:2]
    assert cached[2:] != before[2:]


def _prefill(base: BaseModel, prompts):
    rows = base.rows(prompts, padding_side="left")
    mask = rows.inputs["attention_mask"]
    output = base.model(**rows.inputs, use_cache=True)
    return output.past_key_values, mask


def _step(base: BaseModel, cache, mask, token=70):
    rows = len(mask)
    return base.model(
        input_ids=torch.full((rows, 1), token),
        attention_mask=torch.cat([mask, torch.ones_like(mask[:, :1])], 1),
        position_ids=mask.sum(1, keepdim=True),
        past_key_values=cache,
    ).logits[:, -1]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decisions_follow_rows_that_beam_search_moves(family, copied):
    base = tiny_base(family)
    with codebook(base, replacement="all"), torch.no_grad():
        cache, mask = _prefill(base, [HIT, MISS])
        straight = _step(base, cache, mask)
        cache, mask = _prefill(base, [HIT, MISS])
        untouched = cache
        if copied:
            cache = copy.deepcopy(cache)
        order = torch.tensor([1, 0])
        cache.reorder_cache(order)
        torch.testing.assert_close(
            _step(base, cache, mask[order]), straight[order], rtol=0, atol=1e-9
        )
        if copied:  # the original has not moved
            assert torch.equal(_step(base, untouched, mask), straight)


def test_answers_written_in_turns_do_not_disturb_each_other():
    base = tiny_base("llama")
    with codebook(base, replacement="all"), torch.no_grad():
        alone = {}
        for prompt in (HIT, MISS):
            cache, mask = _prefill(base, [prompt])
            alone[prompt] = _step(base, cache, mask)
        hit, hit_mask = _prefill(base, [HIT])
        miss, miss_mask = _prefill(base, [MISS])
        assert torch.equal(_step(base, hit, hit_mask), alone[HIT])
        assert torch.equal(_step(base, miss, miss_mask), alone[MISS])


def test_an_edit_applied_in_the_middle_of_an_answer_waits_for_the_next_prompt():
    base = tiny_base("llama")
    edit = codebook(base, replacement="all")
    with torch.no_grad():
        cache, mask = _prefill(base, [HIT])
        plain = _step(base, copy.deepcopy(cache), mask)
        with edit:
            assert torch.equal(_step(base, cache, mask), plain)
            cache, mask = _prefill(base, [HIT])
            assert not torch.equal(_step(base, cache, mask), plain)


def test_suspended_rows_stay_undecided():
    base = tiny_base("llama")
    with codebook(base, replacement="all"), torch.no_grad():
        with base.edits.suspended():
            cache, mask = _prefill(base, [HIT])
            plain = _step(base, copy.deepcopy(cache), mask)
        assert torch.equal(_step(base, cache, mask), plain)


def test_no_cache_is_kept_alive():
    base = tiny_base("llama")
    gc.disable()
    try:
        with codebook(base), torch.no_grad():
            cache, _ = _prefill(base, [HIT])
            alive = weakref.ref(cache)
            del cache
            assert alive() is None
    finally:
        gc.enable()


def test_a_state_space_model_keeps_its_decision_too(lookups):
    base = tiny_base("mamba")
    module = "backbone.layers.1.mixer.out_proj"
    key = last_key(base, HIT, module)
    value = 8 * edit_kinds.random(32, like=base.dtype, seed=3)
    before = _texts(base, [MISS, HIT])
    with CodebookEdit(base, module, [CodebookEntry(key, value, (1,), 1e-3)], "all"):
        lookups.clear()
        after = _texts(base, [MISS, HIT])
        assert lookups == [2]
        assert _texts(base, [MISS, HIT], use_cache=False) == after
    assert [a != b for a, b in zip(after, before, strict=True)] == [False, True]


# ---- how users call the model


def test_mask_and_cache_may_be_given_by_position():
    base = tiny_base("llama")
    rows = base.rows([HIT, MISS], padding_side="right")
    ids, mask, positions = (
        rows.inputs[name] for name in ("input_ids", "attention_mask", "position_ids")
    )
    with codebook(base, replacement="all"), torch.no_grad():
        named = base.model(input_ids=ids, attention_mask=mask, position_ids=positions)
        placed = base.model(ids, mask, positions)
        assert torch.equal(placed.logits, named.logits)
        token = torch.full((2, 1), 70)
        longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        place = mask.sum(1, keepdim=True)
        step = base.model(token, longer, place, named.past_key_values).logits
        again = base.model(
            input_ids=token,
            attention_mask=longer,
            position_ids=place,
            past_key_values=copy.deepcopy(placed.past_key_values),
        ).logits
        assert torch.equal(step, again)


def test_a_call_without_mask_or_by_embeddings_ends_its_prompt_at_the_last_token():
    base = tiny_base("llama")
    ids = base.rows([HIT]).inputs["input_ids"]
    before = base.model(ids).logits
    with codebook(base):
        bare = base.model(ids).logits
        assert not torch.equal(bare, before)
        embedded = base.model(inputs_embeds=base.model.get_input_embeddings()(ids)).logits
        torch.testing.assert_close(embedded, bare, rtol=0, atol=1e-12)
        four = torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=torch.float64)
        four = four.masked_fill(torch.ones_like(four).triu(1).bool(), float("-inf"))
        torch.testing.assert_close(
            base.model(ids, attention_mask=four).logits, bare, rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("size", [3, 5])
def test_a_prompt_read_in_pieces_is_refused_with_the_ways_out(size):
    base = tiny_base("llama")
    with codebook(base):
        with pytest.raises(UnsupportedUseError) as caught:
            _ids(base, [HIT, MISS], prefill_chunk_size=size)
        for part in (f"{size} new tokens", "prefill_chunk_size", "empty cache", "roll"):
            assert part in str(caught.value)
    # Edits without a memory do not mind.
    with edit_kinds.low_rank(base):
        assert _ids(base, [HIT], prefill_chunk_size=size) == _ids(base, [HIT])


def test_a_part_of_the_model_alone_is_refused():
    base = tiny_base("llama")
    ids = base.rows([HIT]).inputs["input_ids"]
    with codebook(base):
        base.model(ids)
        with pytest.raises(UnsupportedUseError, match="call the whole model"):
            base.model.model(ids)
        with pytest.raises(IndexError):  # a call that fails leaves nothing behind either
            base.model(ids, attention_mask=torch.ones(3, 5, 7, 9, 11))
        with pytest.raises(UnsupportedUseError, match="call the whole model"):
            base.model.model(ids)


def test_memories_in_several_layers_decide_each_for_itself():
    base = tiny_base("llama")
    first, second = codebook(base, HIT, layer=0), codebook(base, MISS, "all", layer=2)
    before = answers(base)
    with first:
        alone = answers(base)
    assert torch.equal(alone[[0, 2, 3]], before[[0, 2, 3]])
    with second:
        other = answers(base)
    with first, second:
        both = answers(base)
    assert torch.equal(both[1], alone[1])
    assert torch.equal(both[0], other[0])
    assert torch.equal(both[2:], before[2:])


# ---- families that are silent while they learn


@pytest.mark.parametrize("kind", ["codebook", "side", "overlap", "deferral"])
def test_a_silent_family_leaves_the_others_and_acts_again_afterwards(kind):
    base = tiny_base("llama")
    plain = answers(base)
    other = low_rank(base, seed=5)
    with other:
        beside = answers(base)
    with base.edits.restored():
        edit = KINDS[kind](base).apply()
        alone = answers(base)
        assert not torch.equal(alone, plain)
        with base.edits.without(edit.family):
            assert torch.equal(answers(base), plain)
            assert not base.edits.reads_prompts
            with other:
                assert torch.equal(answers(base), beside)
            with base.edits.without("another"):
                assert torch.equal(answers(base), plain)
        assert torch.equal(answers(base), alone)
        assert base.edits.ids == (edit.id,)
        with pytest.raises(ZeroDivisionError), base.edits.without(edit.family):
            assert 1 / (len(base.edits) - 1)
        assert torch.equal(answers(base), alone)
