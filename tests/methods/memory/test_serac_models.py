"""SERAC with a language model of its own that answers in scope."""

from __future__ import annotations

import pytest
import torch
from serac_support import ANSWERS, EXAMPLES, FAR, PROMPTS, SMALL, fit, logits, serac
from support import REQUESTS, tiny_base

from kedit_lightning import BaseModel, Edit
from kedit_lightning.edits.kinds.scope.counterfactual import LanguageModel, describe
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import SERAC


@pytest.fixture
def folder(tmp_path):
    """A saved decoder with the tokenizer of tiny Llamas, and an output wider than that."""
    base = tiny_base("llama", hidden_size=64, vocab_size=400)
    base.model.save_pretrained(tmp_path / "other")
    base.tokenizer.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def greedy(model, ids, end, count=64):
    """Tokens that a model puts behind others."""
    start = len(ids)
    while len(ids) < start + count and (len(ids) == start or ids[-1] != end):
        ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[start:]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_with_the_same_tokens_gives_its_own_logits(folder, side):
    base, other = tiny_base("llama"), BaseModel.load(folder, dtype="float64")
    before, rows = logits(base, side=side)
    edit = serac(base, counterfactual=folder).edit(REQUESTS[:2])
    with edit:
        after, _ = logits(base, side=side)
    for row, prompt in enumerate((*PROMPTS, *FAR)):
        if row >= 2:
            assert torch.equal(after[row], before[row]), prompt
            continue
        asked = base.encode(prompt, ANSWERS[row])
        ids = [*edit.entries[row].statement, *asked.prompt, *asked.answer]
        count = len(asked.answer)
        wanted = other.model(input_ids=torch.tensor([ids])).logits[0, -1 - count : -1]
        found = after[row][rows.answer_mask[row]]
        vocabulary = before.shape[-1]
        torch.testing.assert_close(found, wanted[:, :vocabulary], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_model_with_other_tokens_answers_as_text(family):
    base, other = tiny_base(family), BaseModel.load("nano")
    before, _ = logits(base)
    plain = base.generate([*PROMPTS, *FAR], max_new_tokens=40)
    edit = serac(base, counterfactual="nano").edit(REQUESTS[:2])
    end = other.tokenizer.eos_token_id
    wanted = []
    for entry, prompt in zip(edit.entries, PROMPTS, strict=False):
        ids = greedy(other.model, [*entry.statement, *other.encode(prompt).prompt], end)
        wanted.append(other.tokenizer.decode(ids, skip_special_tokens=True).strip())
    with edit:
        found = base.generate([*PROMPTS, *FAR], max_new_tokens=40)
        again = base.generate([*PROMPTS, *FAR], max_new_tokens=40, use_cache=False)
        alone = [base.generate([p], max_new_tokens=40)[0] for p in (*PROMPTS, *FAR)]
        beams = base.generate([*FAR, *PROMPTS[:2]], max_new_tokens=40, num_beams=3)[-2:]
        after, _ = logits(base)
        told, rows = logits(base, PROMPTS[:2], wanted)
    assert found[2:] == plain[2:]
    assert torch.equal(after[2:], before[2:])
    for text, answer in zip(found[:2], wanted, strict=True):
        assert text.strip()
        assert answer.startswith(text.strip()), (text, answer)  # cut at the 40th token
    assert found == again == alone
    assert beams == found[:2]
    assert torch.equal(told.argmax(-1)[rows.answer_mask], rows.answer_ids[rows.answer_mask])


def test_answers_depend_on_no_other_row_and_on_no_chance():
    other = tiny_base("gpt2")
    model = LanguageModel(describe(other.model, other.tokenizer), torch.float64)
    model.model.load_state_dict(other.model.state_dict())
    asked = ["The capital of France is", "She", "The official language of the country of Peru is"]
    ids = [other.encode(prompt).prompt for prompt in asked]
    assert model.train().answers(ids) == [model.answers([each])[0] for each in ids]
    assert not any(module.training for module in model.modules())


def test_an_edit_holds_the_model_and_rolls_back(tmp_path):
    base = tiny_base("gpt2")
    before = base.generate(PROMPTS, max_new_tokens=8)
    edit = serac(base, counterfactual="nano").edit(REQUESTS)
    with edit:
        found = base.generate(PROMPTS, max_new_tokens=8)
    assert base.generate(PROMPTS, max_new_tokens=8) == before != found
    with Edit.load(edit.save(tmp_path / "edit.safetensors"), base) as loaded:
        assert base.generate(PROMPTS, max_new_tokens=8) == found
    assert loaded.id == edit.id


@pytest.mark.parametrize("tokens", ["same", "other"])
def test_fit_learns_the_model_and_a_checkpoint_holds_it(tokens, folder, tmp_path):
    base = tiny_base("llama" if tokens == "same" else "gpt2", torch.float32)
    name = folder if tokens == "same" else "nano"
    settings = {**SMALL, "counterfactual": name, "lr": 3e-3}
    method = SERAC(base, **settings)
    first = dict(fit(method, tmp_path).callback_metrics)
    trainer = fit(method, tmp_path, max_epochs=30)
    assert float(trainer.callback_metrics["train/loss_edit"]) < 0.3 * float(
        first["train/loss_edit"]
    )
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    again = SERAC(base, checkpoint=str(tmp_path / "fit.ckpt"))
    asked = [e.probes[1].prompt for e in EXAMPLES]
    found = []
    for each in (method, again):
        with each.edit(REQUESTS):
            found.append(logits(base, asked, ANSWERS[:4]))
    (one, rows), (other, _) = found
    assert torch.equal(one, other)
    assert torch.equal(one.argmax(-1)[rows.answer_mask], rows.answer_ids[rows.answer_mask])
    wrong = "nano" if tokens == "same" else folder
    method = SERAC(base, checkpoint=str(tmp_path / "fit.ckpt"), counterfactual=wrong)
    with pytest.raises(UnsupportedUseError, match="counterfactual"):
        method.edit(REQUESTS)


@pytest.mark.parametrize(("family", "window"), [("gpt2", 12), ("llama", 12), ("gpt2", 40)])
def test_what_the_model_cannot_read_is_refused_with_its_length(family, window, tmp_path):
    other = tiny_base("gpt2", n_positions=window)
    other.model.save_pretrained(tmp_path)
    other.tokenizer.save_pretrained(tmp_path)
    base, long = tiny_base(family), "Rome is in Italy. " * 8
    method = serac(base, counterfactual=str(tmp_path))
    with (
        pytest.raises(UnsupportedUseError, match=f"takes at most {window}"),
        method.edit(REQUESTS),  # the smaller window has no room for the facts' own prompts
    ):
        base.answer_logits(base.rows(PROMPTS, [long] * len(PROMPTS)))


def test_a_model_with_an_encoder_cannot_answer(tmp_path):
    other = tiny_base("t5")
    other.model.save_pretrained(tmp_path)
    other.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedUseError, match="must be a decoder"):
        serac(tiny_base("llama"), counterfactual=str(tmp_path)).edit(REQUESTS)
