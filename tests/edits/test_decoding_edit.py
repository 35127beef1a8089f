"""A decoding edit that contrasts the last block with an early one, as in examples/."""

from __future__ import annotations

import importlib.util

import edit_kinds
import pytest
import torch
from edit_kinds import ANSWERS, PROMPTS, answers, raw_logits
from places import ROOT
from support import tiny_base

from kedit_lightning import Edit
from kedit_lightning.errors import UnsupportedUseError

BLOCK = 1


def _example():
    path = ROOT / "examples" / "decoding_edit.py"
    spec = importlib.util.spec_from_file_location("decoding_edit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = _example()


def dola(base, **settings):
    return example.ContrastEdit(base, BLOCK, **settings)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request):
    return tiny_base("llama", tie_word_embeddings=request.param)


@torch.no_grad()
def reference(base, ids, alpha=0.1):
    """Contrasted logits of one row without padding, from all hidden states. ``[tokens, vocab]``"""
    output = base.model(torch.tensor([ids]), output_hidden_states=True)
    early = base.model.lm_head(base.model.model.norm(output.hidden_states[BLOCK + 1][0]))
    after = output.logits[0].log_softmax(-1)
    plausible = after.exp() >= alpha * after.exp().amax(-1, keepdim=True)
    return torch.where(plausible, after - early.log_softmax(-1), -1e4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("below", [False, True])
def test_teacher_forced_answers_equal_a_dense_reference(base, below, side):
    with base.edits.restored():
        if below:  # the early states are those of the edited model
            edit_kinds.low_rank(base, layer=0).apply()
        wanted = []
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            row = base.encode(prompt, answer)
            logits = reference(base, [*row.prompt, *row.answer])[len(row.prompt) - 1 : -1]
            chosen = torch.tensor(row.answer)[:, None]
            wanted.append(logits.log_softmax(-1).gather(-1, chosen)[:, 0])
        dola(base).apply()
        rows = base.rows(PROMPTS, ANSWERS, padding_side=side)
        together = base.answer_log_probs(rows)
        for number, row in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
            alone = base.answer_log_probs(base.rows(row[:1], row[1:]))[0]
            torch.testing.assert_close(alone, wanted[number], rtol=0, atol=1e-9)
            found = together[number][rows.answer_mask[number]]
            torch.testing.assert_close(found, wanted[number], rtol=0, atol=1e-9)


def test_generation_equals_the_reference_with_and_without_a_cache(base):
    plain = base.generate(PROMPTS, max_new_tokens=6)
    wanted = []
    for prompt in PROMPTS:
        ids = list(base.encode(prompt).prompt)
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != base.tokenizer.eos_token_id:
            ids.append(int(reference(base, ids)[-1].argmax()))
        wanted.append(base.tokenizer.decode(ids[start:], skip_special_tokens=True))
    rows = base.rows(PROMPTS, padding_side="left")
    with dola(base):
        for use_cache in (True, False):
            assert base.generate(PROMPTS, max_new_tokens=6, use_cache=use_cache) == wanted
            ids = base.model.generate(
                **{name: rows.inputs[name] for name in ("input_ids", "attention_mask")},
                max_new_tokens=6,
                do_sample=False,
                use_cache=use_cache,
            )[:, rows.inputs["input_ids"].shape[1] :]
            assert base.tokenizer.batch_decode(ids, skip_special_tokens=True) == wanted
        chunked = base.generate(PROMPTS, max_new_tokens=6, prefill_chunk_size=3)
    assert chunked == wanted
    assert wanted != plain


def test_logits_of_plain_calls_are_those_of_the_reference(base):
    ids = list(base.encode(PROMPTS[0]).prompt)
    wanted = reference(base, ids)
    with dola(base), torch.no_grad():
        whole = base.model(torch.tensor([ids])).logits[0]
        last = base.model(torch.tensor([ids]), logits_to_keep=2).logits[0]
        embedded = base.model(inputs_embeds=base.model.get_input_embeddings()(torch.tensor([ids])))
        torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-9)
        torch.testing.assert_close(last, wanted[-2:], rtol=0, atol=1e-9)
        torch.testing.assert_close(embedded.logits[0], wanted, rtol=0, atol=1e-9)
        with pytest.raises(UnsupportedUseError, match="loss"):
            base.model(torch.tensor([ids]), labels=torch.tensor([ids]))
        with base.edits.suspended():
            assert not torch.equal(base.model(torch.tensor([ids])).logits[0], whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_rolls_back_to_the_last_bit_and_is_read_back_from_a_file(dtype, tmp_path):
    base = tiny_base("llama", dtype)
    before, raw = answers(base), raw_logits(base.model)
    with dola(base, alpha=0.2) as edit:
        edited = answers(base)
    assert torch.equal(answers(base), before)
    assert torch.equal(raw_logits(base.model), raw)
    assert not torch.equal(edited, before)
    with Edit.load(edit.save(tmp_path / "edit.safetensors"), base):
        assert torch.equal(answers(base), edited)


def test_passes_do_not_start_in_the_middle_under_an_edit_that_reads_states():
    base = tiny_base("llama")
    with dola(base):
        assert base.edits.reads_prompts
    assert not base.edits.reads_prompts


def test_decoding_edits_act_in_the_order_of_the_stack(base):
    ids = torch.tensor([list(base.encode(PROMPTS[0]).prompt)])
    with torch.no_grad():
        with dola(base), edit_kinds.bonus(base):
            late = base.model(ids).logits[0]
        with edit_kinds.bonus(base), dola(base):
            early = base.model(ids).logits[0]
    wanted = reference(base, ids[0].tolist())
    wanted[:, 70] += 60
    torch.testing.assert_close(late, wanted, rtol=0, atol=1e-9)
    assert (early[:, :70] == -1e4).all()  # the bonus made all other tokens implausible


def test_the_example_prints_answers_with_and_without_the_edit(capsys):
    example.main()
    printed = capsys.readouterr().out
    assert printed.count("plain:") == printed.count("contrast:") == 2
