"""SERAC on models with an encoder and a decoder."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from serac_support import ANSWERS, EXAMPLES, FAR, PROMPTS, SMALL, data, fit, logits, outcome, serac
from support import REQUESTS, tiny_base, tiny_model, tiny_tokenizer
from tokenizers import processors

from kedit_lightning import BaseModel, Edit, EditTrainer
from kedit_lightning.data import Requests
from kedit_lightning.methods import SERAC
from kedit_lightning.methods.memory.serac.scope_losses import prompt_hidden_states

ALL = [*PROMPTS, *FAR]


def closing_base():
    """A tiny T5 whose tokenizer puts an end behind each text, as that of T5 does."""
    tokenizer = copy.deepcopy(tiny_tokenizer(bos=False))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return BaseModel(tiny_model("t5"), tokenizer, name="t5")


def lead(base, edit, number, prompt):
    """What the counterfactual model reads before an answer."""
    return [
        *edit.entries[number].statement,
        *base.encode(prompt).prompt,
        *base.encoder.suffix,
    ]


def next_logits(base, edit, ids):
    """Logits of the counterfactual model behind some ids. Shape ``[vocab]``."""
    embedding = base.model.get_input_embeddings().weight
    states = edit.networks.answer_states(torch.tensor([ids]), embedding)
    return edit.networks.logits(states, embedding)[0, -1]


def greedy(base, edit, number, prompt, steps):
    """Text that the counterfactual model writes."""
    ids = lead(base, edit, number, prompt)
    start = len(ids)
    for _ in range(steps):
        ids.append(int(next_logits(base, edit, ids).argmax()))
        if ids[-1] == base.tokenizer.eos_token_id:
            break
    return base.tokenizer.decode(ids[start:], skip_special_tokens=True)


each_base = pytest.mark.parametrize("make", [lambda: tiny_base("t5"), closing_base])


def test_the_classifier_reads_a_block_at_a_third_of_the_encoder():
    base = tiny_base("t5", num_layers=6)
    method = serac(base)
    method.configure_model()
    assert method.network.scope.plan.module == "encoder.block.2"
    hidden, mask = prompt_hidden_states(base, ALL, "encoder.block.2")
    rows = base.rows(ALL)
    states = base.forward(rows, output_hidden_states=True).encoder_hidden_states[3]
    assert torch.equal(hidden, states)
    assert torch.equal(mask, rows.attention_mask)


@each_base
def test_rows_in_scope_get_the_other_model_and_the_rest_stay_bit_for_bit(make):
    base = make()
    before, rows = logits(base)
    edit = serac(base).edit(REQUESTS[:2])
    with edit:
        after, _ = logits(base)
        whole = base.model(**rows.inputs).logits
    for row, prompt in enumerate(ALL):
        if row >= 2:
            assert torch.equal(after[row], before[row]), prompt
            continue
        answer = base.encode(prompt, ANSWERS[row]).answer
        for place in range(len(answer)):
            ids = [*lead(base, edit, row, prompt), *answer[:place]]
            wanted = next_logits(base, edit, ids).double()
            torch.testing.assert_close(after[row, place], wanted, rtol=0, atol=1e-6)
            torch.testing.assert_close(whole[row, place], wanted, rtol=0, atol=1e-6)
        assert not torch.allclose(after[row, 0], before[row, 0], atol=1e-2)
    assert torch.equal(logits(base)[0], before)


def test_the_mask_of_the_decoder_tells_its_padding():
    base = tiny_base("t5")
    rows = base.rows(PROMPTS[:2], ["Rome, Italy", "Berlin"])
    inputs = dict(rows.inputs)
    ids, mask = (inputs.pop(f"decoder_{name}") for name in ("input_ids", "attention_mask"))
    shift = torch.nn.functional.pad
    with serac(base).edit(REQUESTS[:2]):
        plain = base.model(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        moved = base.model(
            **inputs,
            decoder_input_ids=shift(ids, (2, 0)),
            decoder_attention_mask=shift(mask, (2, 0)),
        ).logits[:, 2:]
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-9)


def test_padding_batches_and_order_change_no_row():
    base = closing_base()
    with serac(base).edit(REQUESTS[:2]):
        together, _ = logits(base)
        for row, prompt in enumerate(ALL):
            alone, _ = logits(base, [prompt], [ANSWERS[row]])
            width = alone.shape[1]
            torch.testing.assert_close(together[row, :width], alone[0], rtol=0, atol=1e-6)
        turned, _ = logits(base, ALL[::-1], ANSWERS[::-1])
    torch.testing.assert_close(turned.flip(0), together, rtol=0, atol=1e-6)


@each_base
@pytest.mark.parametrize("cache", [True, False])
def test_generation_follows_the_other_model_token_by_token(make, cache):
    base = make()
    asked = [FAR[0], *PROMPTS, *FAR[1:]]
    edit = serac(base).edit(REQUESTS[:2])
    plain = base.generate(asked, max_new_tokens=6)
    wanted = [greedy(base, edit, row, PROMPTS[row], 6) for row in (0, 1)]
    with edit:
        texts = base.generate(asked, max_new_tokens=6, use_cache=cache)
        alone = base.generate([PROMPTS[1]], max_new_tokens=6, use_cache=cache)
    assert texts == [plain[0], *wanted, *plain[3:]]
    assert alone == wanted[1:]
    assert wanted != plain[1:3]


@pytest.mark.parametrize("cache", [True, False])
def test_beams_carry_the_routing_of_their_row(cache):
    base = closing_base()
    rows = base.rows([FAR[0], *PROMPTS])
    inputs = {name: rows.inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "use_cache": cache}
    told = {"return_dict_in_generate": True, "output_scores": True}
    edit = serac(base).edit(REQUESTS[:2])
    plain = base.model.generate(**inputs, **options, num_return_sequences=3, **told)
    with edit:
        found = base.model.generate(**inputs, **options, num_return_sequences=3, **told)
    pad = base.pad_id
    for row in range(5):
        if row not in (1, 2):
            beams = slice(3 * row, 3 * row + 3)
            assert torch.equal(found.sequences[beams], plain.sequences[beams]), row
            assert torch.equal(found.sequences_scores[beams], plain.sequences_scores[beams])
            continue
        for beam in range(3 * row, 3 * row + 3):
            ids, total = lead(base, edit, row - 1, PROMPTS[row - 1]), 0.0
            written = [int(token) for token in found.sequences[beam, 1:]]
            if base.tokenizer.eos_token_id in written:
                written = written[: written.index(base.tokenizer.eos_token_id) + 1]
            assert pad not in written
            for token in written:
                total += float(next_logits(base, edit, ids).log_softmax(-1)[token])
                ids.append(token)
            score = float(found.sequences_scores[beam])
            assert score == pytest.approx(total / len(written), abs=1e-5)


def test_answers_written_in_turns_keep_their_own_question():
    base = tiny_base("t5")
    with serac(base).edit(REQUESTS[:2]):
        wanted, caches, found = [], [], []
        for prompt in (PROMPTS[0], FAR[0]):
            rows = base.rows([prompt], ["Rome, Italy"])
            wanted.append(base.forward(rows).logits[0])
            start = {**rows.inputs, "decoder_input_ids": rows.inputs["decoder_input_ids"][:, :1]}
            del start["decoder_attention_mask"]
            first = base.model(**start, use_cache=True)
            caches.append((first, rows))
            found.append([first.logits[0, -1]])
        for place in range(1, len(wanted[0])):
            for number, (first, rows) in enumerate(caches):
                step = base.model(
                    encoder_outputs=(first.encoder_last_hidden_state,),
                    attention_mask=rows.attention_mask,
                    decoder_input_ids=rows.inputs["decoder_input_ids"][:, place : place + 1],
                    past_key_values=first.past_key_values,
                    use_cache=True,
                )
                found[number].append(step.logits[0, -1])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.stack(one), other, rtol=0, atol=1e-6)


def test_a_reordered_cache_takes_the_question_along():
    base = tiny_base("t5")
    rows = base.rows(PROMPTS[:2], ["Rome, Italy", "Rome, Italy"])
    start, rest = rows.inputs["decoder_input_ids"].split([1, rows.answer_ids.shape[1] - 1], dim=1)
    given = {name: rows.inputs[name] for name in ("input_ids", "attention_mask")}
    with serac(base).edit(REQUESTS[:2]):
        wanted = base.forward(rows).logits[:, 1]
        first = base.model(**given, decoder_input_ids=start, use_cache=True)
        turned = torch.tensor([1, 0])
        first.past_key_values.reorder_cache(turned)
        found = base.model(
            encoder_outputs=(first.encoder_last_hidden_state[turned],),
            attention_mask=rows.attention_mask[turned],
            decoder_input_ids=rest[:, :1],
            past_key_values=first.past_key_values,
        ).logits[:, 0]
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-2)
    torch.testing.assert_close(found[turned], wanted, rtol=0, atol=1e-6)


def test_rows_can_carry_an_edit_each():
    base = tiny_base("t5")
    method = serac(base)
    edits = [method.edit([request]) for request in REQUESTS[:2]]
    prompts, answers = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], ["Rome"] * 4
    plain = logits(base, prompts, answers)[0]
    written = base.generate(prompts, max_new_tokens=4)
    with base.edits.carried([edits[0], edits[1], None, edits[1]]):
        found = logits(base, prompts, answers)[0]
        texts = base.generate(prompts, max_new_tokens=4)
    assert torch.equal(found[[1, 2]], plain[[1, 2]])
    assert texts[1:3] == written[1:3]
    for row, edit in ((0, edits[0]), (3, edits[1])):
        with edit:
            own = logits(base, [prompts[row]], ["Rome"])[0]
            torch.testing.assert_close(found[row], own[0], rtol=0, atol=1e-6)
            assert texts[row] == base.generate([prompts[row]], max_new_tokens=4)[0]


def test_edits_are_saved_and_rolled_back(tmp_path):
    base = tiny_base("t5")
    method = serac(base)
    before = logits(base)[0]
    first, second = (method.edit([request]) for request in REQUESTS[:2])
    with base.edits.restored():
        first.apply()
        alone = logits(base)[0]
        with pytest.warns(UserWarning, match="on top of"):
            second.apply()
        both = logits(base)[0]
        torch.testing.assert_close(both[0], alone[0], rtol=0, atol=1e-6)  # other padding
        assert not torch.equal(both[1], alone[1])
        second.rollback()
        assert torch.equal(logits(base)[0], alone)
    assert torch.equal(logits(base)[0], before)
    with Edit.load(first.save(tmp_path / "edit.safetensors"), base):
        assert torch.equal(logits(base)[0], alone)


# ---- fit


@each_base
def test_the_loss_of_answers_is_that_of_the_rows_asked_one_by_one(make):
    base = make()
    method = serac(base)
    edit = method.edit(REQUESTS)
    losses = []
    for number, this in enumerate(EXAMPLES):
        for probe in (p for p in this.probes if p.kind != "locality"):
            ids = lead(base, edit, number, probe.prompt)
            answer = base.encode(probe.prompt, probe.answers[0]).answer
            for token in (*answer, base.tokenizer.eos_token_id):
                losses.append(-float(next_logits(base, edit, ids).log_softmax(-1)[token]))
                ids.append(token)
    found = float(outcome(method, EXAMPLES).scalars["loss_edit"])
    assert found == pytest.approx(math.fsum(losses) / len(losses), abs=1e-6)


def test_fit_learns_both_networks_and_a_checkpoint_gives_the_same_answers(tmp_path):
    base = tiny_base("t5", torch.float32)
    method = SERAC(base, **SMALL)
    trainer = fit(method, tmp_path, max_epochs=60)
    last = trainer.callback_metrics
    assert float(last["train/edit_success"]) == 1.0
    assert float(last["train/scope_hits"]) == 1.0
    trainer.save_checkpoint(tmp_path / "t5.ckpt")
    saved = torch.load(tmp_path / "t5.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("network.") for name in saved)
    again = SERAC(base, checkpoint=str(tmp_path / "t5.ckpt"))
    rephrases = [this.probes[1].prompt for this in EXAMPLES]
    near = [this.probes[3].prompt for this in EXAMPLES]
    plain = logits(base, near, ["Paris"] * 4)[0]
    written = []
    for each in (method, again):
        with each.edit(REQUESTS):
            found, rows = logits(base, rephrases, ANSWERS)
            assert bool(((found.argmax(-1) == rows.answer_ids) | ~rows.answer_mask).all())
            assert torch.equal(logits(base, near, ["Paris"] * 4)[0], plain)
            texts = base.generate(rephrases, max_new_tokens=8)
            written.append([text.strip() for text in texts])
    assert written[0] == written[1] == ANSWERS[:4]


def test_edits_are_validated_during_a_fit(tmp_path):
    base = tiny_base("t5", torch.float32)
    path = data(tmp_path).train_path
    trainer = EditTrainer(
        max_epochs=60,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=60,
        default_root_dir=tmp_path,
    )
    trainer.fit(SERAC(base, **SMALL), Requests(train_path=path, val_path=path, seed=3))
    assert float(trainer.callback_metrics["val/rephrase/tf_all"]) == 1.0
    assert float(trainer.callback_metrics["val/locality/keep_top1"]) == 1.0
    assert len(base.edits) == 0
