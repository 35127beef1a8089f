"""Calls of a model that are no whole prompt: chunks, single tokens, guesses, beams."""

from __future__ import annotations

import copy
import functools

import edit_kinds
import pytest
import torch
from edit_kinds import PROMPTS
from serac_support import serac
from support import REQUESTS, tiny_base, tiny_model

from kedit_lightning import BaseModel
from kedit_lightning.errors import UnsupportedUseError

#: Neither the longest nor the shortest prompt.
HIT, MISS = PROMPTS[1], PROMPTS[0]


def scope(base: BaseModel):
    """Answers to one prompt by a model of its own."""
    return serac(base, seed=3).edit([REQUESTS[1]])


#: Edits that decide at the end of a prompt.
DECIDING = {
    "last": lambda base: edit_kinds.codebook(base, HIT, "last"),
    "prompt": lambda base: edit_kinds.codebook(base, HIT, "prompt"),
    "all": lambda base: edit_kinds.codebook(base, HIT, "all"),
    "scope": scope,
}
#: Edits that do not.
OTHERS = {
    "low_rank": edit_kinds.low_rank,
    "prompt_edit": edit_kinds.prompt_edit,
    "bonus": lambda base: edit_kinds.BonusEdit(base, {70: 6.0}),
    "composite": edit_kinds.composite,
}
FAMILIES = ("gpt2", "llama")


def ids(base: BaseModel, *prompts: str):
    """Rows as a user makes them, padded on the left, behind what prompt edits put before them."""
    rows = base.rows(prompts, padding_side="left")
    return {name: rows.inputs[name] for name in ("input_ids", "attention_mask")}


def generated(base: BaseModel, prompts=(HIT,), **options):
    """What the model's own ``generate`` gives."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return base.model.generate(**ids(base, *prompts), **options).tolist()


def refusal(call, *args, **options):
    """The sentence in which a call is refused."""
    with pytest.raises(UnsupportedUseError) as caught:
        call(*args, **options)
    assert "roll those edits back" in str(caught.value)
    return str(caught.value)


# ---- prompts in pieces


@pytest.mark.parametrize("kind", DECIDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_fed_token_by_token_is_refused(family, kind):
    base = tiny_base(family)
    tokens = ids(base, HIT)["input_ids"]
    with DECIDING[kind](base), torch.no_grad():
        first = base.model(tokens[:, :1], use_cache=True)
        told = refusal(base.model, tokens[:, 1:2], past_key_values=first.past_key_values)
        assert "token by token" in told
        assert "prompts_end_at" in told
        # Where its end is known, the first of its tokens is refused already.
        with base.edits.prompts_end_at(torch.tensor([tokens.shape[1] - 1])):
            assert f"a prompt of {tokens.shape[1]} columns" in refusal(base.model, tokens[:, :1])


@pytest.mark.parametrize("kind", ["low_rank", "bonus"])
def test_edits_without_a_memory_read_prompts_in_pieces(kind):
    base = tiny_base("llama")
    tokens = ids(base, HIT)["input_ids"]
    with OTHERS[kind](base), torch.no_grad():
        whole = base.model(tokens).logits[:, -1]
        cache = None
        for column in range(tokens.shape[1]):
            piece = tokens[:, column : column + 1]
            output = base.model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
        torch.testing.assert_close(output.logits[:, -1], whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["last", "scope"])
def test_chunks_are_refused_by_their_size_even_where_one_token_is_left(kind):
    base = tiny_base("llama")
    columns = ids(base, HIT)["input_ids"].shape[1]
    with DECIDING[kind](base):
        whole = generated(base)
        for size in (1, columns // 2, columns - 1):
            told = refusal(generated, base, prefill_chunk_size=size)
            assert f"{size} new tokens of a prompt of {columns} columns" in told
        told = refusal(base.generate, [HIT], prefill_chunk_size=columns - 1)
        assert f"{columns - 1} new tokens" in told
        for size in (columns, columns + 5):
            assert generated(base, prefill_chunk_size=size) == whole
        with base.edits.suspended():
            assert generated(base, prefill_chunk_size=3) == generated(base)


@pytest.mark.parametrize("kind", OTHERS)
def test_edits_without_a_memory_take_chunks(kind):
    base = tiny_base("llama")
    with OTHERS[kind](base):
        whole, texts = generated(base, (HIT, MISS)), base.generate([HIT, MISS])
        for size in (1, 3):
            assert generated(base, (HIT, MISS), prefill_chunk_size=size) == whole
            assert base.generate([HIT, MISS], prefill_chunk_size=size) == texts


@pytest.mark.parametrize("left", [1, 3])
@pytest.mark.parametrize("before", [True, False])
def test_a_cache_that_holds_the_start_of_a_prompt_is_refused(left, before):
    base = tiny_base("llama")
    given = ids(base, HIT)
    edit = DECIDING["all"](base)
    with edit, torch.no_grad():
        whole = generated(base)
        with base.edits.suspended() if before else edit:
            cache = base.model(given["input_ids"][:, :-left], use_cache=True).past_key_values
        for tokens in (given["input_ids"], given["input_ids"][:, -left:]):
            options = {"attention_mask": given["attention_mask"], "max_new_tokens": 8}
            kept = copy.deepcopy(cache)
            told = refusal(base.model.generate, tokens, past_key_values=kept, **options)
            assert "empty cache" in told
        assert generated(base) == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_one_token_whose_end_is_told_is_answered_step_by_step(family):
    base = tiny_base(family)
    token = torch.tensor([[70]])
    with edit_kinds.codebook(base, MISS, "all", radius=1e6), torch.no_grad():
        whole = base.model(torch.tensor([[70, 71]]), use_cache=False)
        with base.edits.prompts_end_at(torch.tensor([0])):
            whole = base.model(torch.tensor([[70, 71]])).logits[:, -1]
            first = base.model(token, use_cache=True)
            cache = first.past_key_values
            step = base.model(torch.tensor([[71]]), past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(step, whole, rtol=0, atol=1e-9)


# ---- the model's own generate


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gpt2", "all"), ("gpt2", "scope"), ("llama", "prompt"), ("t5", "last"), ("t5", "scope")],
)
def test_generate_decides_once_without_a_cache_too(family, kind):
    base = tiny_base(family)
    with DECIDING[kind](base):
        cached = generated(base, (HIT, MISS))
        assert generated(base, (HIT, MISS), use_cache=False) == cached
        alone = generated(base, use_cache=False)
        assert alone == generated(base)
        beams = {"num_beams": 3, "num_return_sequences": 2}
        with_cache = generated(base, (HIT, MISS), **beams)
        assert generated(base, (HIT, MISS), **beams, use_cache=False) == with_cache


def assistants(base: BaseModel):
    """Options of assisted decoding, by name."""
    return {
        "other": {"assistant_model": tiny_model("llama", num_hidden_layers=1)},
        "itself": {"assistant_model": base.model},
        "early_exit": {"assistant_early_exit": 2},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }


@pytest.mark.parametrize(
    ("kind", "assistant"),
    [
        ("last", "lookup"),
        ("prompt", "itself"),
        ("all", "other"),
        ("all", "early_exit"),
        ("scope", "lookup"),
        ("scope", "itself"),
        ("prompt_edit", "other"),
        ("composite", "lookup"),
    ],
)
def test_assisted_decoding_gives_the_same_answers(kind, assistant):
    base = tiny_base("llama")
    options = assistants(base)[assistant]
    before = generated(base)
    with {**DECIDING, **OTHERS}[kind](base):
        # The second repeats itself, so that looking up guesses something.
        for prompt in (HIT, f"{HIT} {HIT}"):
            greedy = generated(base, (prompt,))
            assert generated(base, (prompt,), **options) == greedy
            assert greedy != before
        texts = base.generate([HIT], max_new_tokens=8)
        assert base.generate([HIT], max_new_tokens=8, **options) == texts


@pytest.mark.parametrize("kind", ["all", "scope", "low_rank"])
def test_an_assistant_that_is_edited_only_guesses(kind):
    base, other = tiny_base("llama"), tiny_base("llama", num_hidden_layers=3)
    with DECIDING["all"](base), {**DECIDING, **OTHERS}[kind](other):
        greedy = generated(base, max_new_tokens=10)
        assert generated(base, assistant_model=other.model, max_new_tokens=10) == greedy
    with pytest.raises(UnsupportedUseError, match="new tokens"), DECIDING["all"](other):
        generated(other, prefill_chunk_size=3)


def test_a_cache_that_was_cut_inside_its_prompt_is_refused():
    base = tiny_base("llama")
    tokens = ids(base, HIT)["input_ids"]
    with DECIDING["all"](base), torch.no_grad():
        cache = base.model(tokens, use_cache=True).past_key_values
        cache.crop(-1)
        told = refusal(base.model, tokens[:, -1:], past_key_values=cache)
        assert f"a prompt of {tokens.shape[1]} columns" in told


@pytest.mark.parametrize("kind", ["all", "scope"])
def test_embeddings_and_positional_tokens_are_prompts_too(kind):
    base = tiny_base("llama")
    tokens = ids(base, HIT)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with DECIDING[kind](base):
        whole = generated(base, max_new_tokens=6)
        assert base.model.generate(tokens, **options).tolist() == whole
        assert base.model.generate(inputs=tokens, use_cache=False, **options).tolist() == whole
        if kind == "scope":
            return  # it reads tokens, and says so
        embedded = base.model.get_input_embeddings()(tokens)
        answer = base.model.generate(inputs_embeds=embedded, **options).tolist()
        assert answer == [whole[0][tokens.shape[1] :]]


def test_generate_is_the_models_own_again_after_rollback():
    base = tiny_base("llama")
    edit, others = DECIDING["all"](base), OTHERS["low_rank"](base)
    for applied in (others, edit):
        with applied:
            assert ("generate" in vars(base.model)) == (applied is edit)
        assert "generate" not in vars(base.model)
    own = functools.partial(type(base.model).generate, base.model)
    base.model.generate = own
    with edit:
        told = generated(base, use_cache=False)
        assert base.model.generate is not own
    assert base.model.generate is own
    with edit:
        assert generated(base) == told


def test_a_copy_generates_by_itself():
    base = tiny_base("llama")
    edit = DECIDING["all"](base)
    with edit:
        whole = generated(base)
        twin = copy.deepcopy(base)
        calls: list[int] = []
        watch = base.model.register_forward_pre_hook(lambda *call: calls.append(1))
        assert generated(twin, use_cache=False) == whole
        edit.rollback()
        assert generated(twin, use_cache=False) == whole
        watch.remove()
        assert not calls
        twin.edits.clear()


def test_several_prompts_in_one_row_are_refused():
    base = tiny_base("llama", dtype=torch.float32)
    tokens = ids(base, HIT)["input_ids"]
    with DECIDING["all"](base), torch.no_grad():
        starts = torch.tensor([0, 4, tokens.shape[1]], dtype=torch.int32)
        told = refusal(base.model, tokens, cu_seq_lens_q=starts)
        assert "several prompts in one row" in told
