"""What every editing method must hold, on three families of models.

A method is added by one line in ``method_examples.METHODS``.  The fast tier runs each method on one
family; the others are marked slow.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from method_examples import METHODS, make
from support import FAMILIES, REQUESTS, TEXT, tiny_base, tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel, Edit, EditRequest, methods
from kedit_lightning.errors import (
    InvalidRequestError,
    MissingNeedsError,
    NonFiniteError,
    UnsupportedUseError,
)

# The requests here are fewer than it should be given.
pytestmark = pytest.mark.filterwarnings("ignore:UltraEdit has seen")
CASES = [
    pytest.param(
        name,
        settings,
        family,
        id=f"{name}-{family}",
        marks=[] if family == FAMILIES[index % len(FAMILIES)] else [pytest.mark.slow],
    )
    for index, (name, settings) in enumerate(METHODS)
    for family in FAMILIES
]
matrix = pytest.mark.parametrize(("name", "settings", "family"), CASES)
each_method = pytest.mark.parametrize(("name", "settings"), METHODS, ids=[n for n, _ in METHODS])

#: Prompts of unequal length: those of the requests, other words for them, and unrelated ones.
PROBES = [
    *[(request.prompt, request.target_new) for request in REQUESTS],
    ("One finds the Eiffel Tower in", "Rome"),
    ("Curie", "Berlin"),
    *[(text.split(".")[0], "Paris") for text in TEXT],
]


def logits(base: BaseModel) -> torch.Tensor:
    """All logits that answer the probes, in one batch."""
    rows = base.rows([prompt for prompt, _ in PROBES], [answer for _, answer in PROBES])
    return base.answer_logits(rows)


def test_every_method_is_in_the_matrix():
    # QLoRA edits weights in 4 bit alone, which test_qlora.py does.
    assert {name for name, _ in METHODS} == set(methods.METHODS) - {"QLoRA"}


# ---- undoing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@matrix
def test_rolls_back_to_the_last_bit(name, settings, family, dtype):
    base = tiny_base(family, dtype)
    before = logits(base)
    edit = make(name, settings, base).edit(REQUESTS)
    assert len(base.edits) == 0
    assert torch.equal(logits(base), before), "edit() alone changed the model"
    with edit:
        assert not torch.equal(logits(base), before), "the edit does nothing"
    assert torch.equal(logits(base), before)
    with pytest.raises(ZeroDivisionError), edit:
        assert 1 / (len(base.edits) - 1)
    assert torch.equal(logits(base), before)
    edit.apply().apply().rollback()
    assert torch.equal(logits(base), before)
    edit.rollback()


@matrix
def test_edits_on_top_of_each_other_come_off_in_any_order(name, settings, family):
    base = tiny_base(family, torch.float32)
    before = logits(base)
    method = make(name, settings, base)
    with base.edits.restored():
        first = method.edit(REQUESTS[:1]).apply()
        alone = logits(base)
        second = method.edit(REQUESTS[1:2])
        assert second.origin.stack == (first.id,)
        second.apply()
        assert not torch.equal(logits(base), alone)
        second.rollback()
        assert torch.equal(logits(base), alone)
        second.apply()
        first.rollback()
        second.rollback()
        assert torch.equal(logits(base), before)


# ---- answers

ASKED = [REQUESTS[0].prompt, REQUESTS[1].prompt, "One finds the Eiffel Tower in"]
NEW_TOKENS = 5
#: Untrained networks of these move the logits, not always the most likely token.
WEAK = {"KE", "MALMEN", "RLEdit"}


def greedy(base: BaseModel, prompt: str) -> str:
    """The most likely continuation by whole passes over one row, without a cache."""
    row, new = base.encode(prompt), []
    while len(new) < NEW_TOKENS and base.tokenizer.eos_token_id not in new:
        rows = base.pad([replace(row, answer=(*new, 0))])
        new.append(int(base.answer_logits(rows)[0, -1].argmax()))
    return base.tokenizer.decode(new, skip_special_tokens=True)


def plain(base: BaseModel) -> list[str]:
    """What the model's own ``generate`` says to the rows of the prompts."""
    rows = base.rows(ASKED, padding_side="left")
    ids = base.model.generate(
        **{name: rows.inputs[name] for name in ("input_ids", "attention_mask")},
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=base.tokenizer.pad_token_id,
    )
    width = rows.inputs["input_ids"].shape[1]
    return base.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)


@matrix
def test_free_answers_are_those_of_whole_passes(name, settings, family):
    base = tiny_base(family)
    before = base.generate(ASKED, max_new_tokens=NEW_TOKENS)
    with make(name, settings, base).edit(REQUESTS):
        free = base.generate(ASKED, max_new_tokens=NEW_TOKENS)
        assert free == [greedy(base, prompt) for prompt in ASKED]
        assert free == plain(base)
        assert free != before or name in WEAK
    assert base.generate(ASKED, max_new_tokens=NEW_TOKENS) == before


# ---- on disk


@matrix
def test_a_saved_edit_gives_equal_logits(name, settings, family, tmp_path):
    base = tiny_base(family)
    edit = make(name, settings, base).edit(REQUESTS)
    with edit:
        expected = logits(base)
    path = edit.save(tmp_path / "edit.safetensors")
    fresh = tiny_base(family)
    loaded = Edit.load(path, fresh)
    assert loaded.id == edit.id
    assert loaded.origin.requests == tuple(REQUESTS)
    with loaded:
        assert torch.equal(logits(fresh), expected)


@each_method
def test_no_checkpoint_holds_the_base_model(name, settings, tmp_path):
    model = tiny_model("gpt2")
    with torch.no_grad():  # fresh norms and biases are alike in all networks; these are not
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.rand_like(parameter))
    base = BaseModel(model, tiny_tokenizer(bos=False))
    method = make(name, settings, base)
    method.edit(REQUESTS[:1])
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(method)
    path = tmp_path / "method.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    found = [t.double() for t in saved.values() if t.dtype.is_floating_point]
    own = {tensor.untyped_storage().data_ptr() for tensor in method.state_dict().values()}
    for name_of, tensor in base.model.state_dict(keep_vars=True).items():
        assert tensor.untyped_storage().data_ptr() not in own, f"{name_of} is the method's own"
        assert not any(key.endswith(name_of) for key in saved), f"{name_of} is in the checkpoint"
        assert not any(
            t.shape == tensor.shape and torch.equal(t, tensor.double()) for t in found
        ), f"{name_of} of the base model is in the checkpoint"
    assert not any(module is base.model for module in method.modules())


# ---- padding, batches, order


def per_record(name, settings, family, side, size, order) -> dict[tuple[int, int], float]:
    """Log-probability of each probe's answer under the edit of each request alone."""
    base = tiny_base(family)
    base.padding_side = side
    method = make(name, settings, base)
    requests, probes = list(range(len(REQUESTS))), list(range(len(PROBES)))
    if order is not None:
        random.Random(order).shuffle(requests)
        random.Random(order).shuffle(probes)
    found = {}
    for number in requests:
        with method.edit([REQUESTS[number]]):
            for start in range(0, len(probes), size):
                chosen = probes[start : start + size]
                rows = base.rows([PROBES[i][0] for i in chosen], [PROBES[i][1] for i in chosen])
                for i, value in zip(chosen, base.answer_log_probs(rows).sum(1), strict=True):
                    found[number, i] = float(value)
    return found


@matrix
def test_padding_batches_and_order_change_no_record(name, settings, family):
    reference = per_record(name, settings, family, "right", 8, None)
    for side, size, order in (("left", 8, None), ("right", 1, 7), ("left", 3, 8)):
        found = per_record(name, settings, family, side, size, order)
        for key, value in reference.items():
            assert found[key] == pytest.approx(value, abs=1e-8), (side, size, order, key)


# ---- weights


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5)],
    ids=["float64", "float32"],
)
@matrix
def test_weights_written_out_equal_the_hooks(name, settings, family, dtype, tolerance):
    base = tiny_base(family, dtype)
    method = make(name, settings, base)
    edit = method.edit(REQUESTS)
    if not method.can.weights:
        with pytest.raises(UnsupportedUseError, match="changes no weights"):
            edit.deltas()
        return
    with edit:
        hooked = logits(base)
    deltas = edit.deltas()
    assert deltas
    for parameter, delta in deltas.items():
        assert delta.shape == base.model.get_parameter(parameter).shape
    written = BaseModel(edit.materialise(), base.tokenizer)
    torch.testing.assert_close(logits(written), hooked, rtol=0, atol=tolerance)
    written.model.load_state_dict(base.model.state_dict())
    with torch.no_grad():
        for parameter, delta in deltas.items():
            written.model.get_parameter(parameter).add_(delta)
    again = logits(BaseModel(written.model, base.tokenizer))
    torch.testing.assert_close(again, hooked, rtol=0, atol=tolerance)
    written.model.load_state_dict(edit.materialise().state_dict())


# ---- bad input


@each_method
def test_refuses_requests_that_say_too_little(name, settings):
    method = make(name, settings, tiny_base("llama"))
    if method.writes_facts:
        with pytest.raises(InvalidRequestError, match="no requests"):
            method.edit([])
    with pytest.raises(InvalidRequestError, match=r"'lyon'.*'subject' \('Atlantis'\)"):
        method.edit([EditRequest("Lyon is in", "Peru", "Atlantis", id="lyon")])
    with pytest.raises(InvalidRequestError, match=r"'lyon'.*'target_new'"):
        method.edit([EditRequest("Lyon is in", "  ", "Lyon", id="lyon")])
    if "subject" in method.needs:
        bare = EditRequest("Lyon is in", "Peru", id="lyon")
        with pytest.raises(MissingNeedsError, match="'lyon' lacks 'subject'"):
            method.edit([REQUESTS[0], bare])


@each_method
def test_refuses_an_encoder_and_decoder_unless_it_can(name, settings):
    base = tiny_base("t5")
    method = make(name, settings, base)
    if method.can.encoder_decoder:
        assert method.edit(REQUESTS[:1]).origin.method == name
    else:
        with pytest.raises(UnsupportedUseError, match="encoder and a decoder"):
            method.edit(REQUESTS[:1])


@each_method
def test_names_weights_that_are_no_numbers(name, settings):
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    base = BaseModel(model, tiny_tokenizer(bos=True))
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        make(name, settings, base).edit(REQUESTS[:1])


@each_method
def test_construction_touches_no_model_and_no_file(name, settings):
    method = make(name, settings, "there/is-no-such-model")
    assert method.settings.seed == 0
    assert not list(Path.cwd().glob("lightning_logs"))
