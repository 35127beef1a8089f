"""Decoders that ignore the attention mask answer as they do alone; tokens without embeddings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_decoders
import torch
from support import REQUESTS, tiny_base, tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel, Probe
from kedit_lightning.base_models.batching import embedded_tokens
from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.reader import Reader
from kedit_lightning.errors import InvalidRequestError, UnsupportedUseError
from kedit_lightning.methods import FTM, ROME
from kedit_lightning.statistics.key_collector import KeyCollector

pytestmark = pytest.mark.filterwarnings("ignore")  # recurrent models miss their fast kernels
PROMPTS = [
    "Rome is",
    "The Eiffel Tower is in the city of",
    "Amber Falls lies in",
    "Lyon is",
    "Marie Curie was born in",
]
#: Decoders that carry a state from token to token, and read the attention mask.
RECURRENT = [
    "mamba",
    "mamba2",
    "falcon_mamba",
    "jamba",
    "bamba",
    "zamba",
    "zamba2",
    "falcon_h1",
    "lfm2",
    "qwen3_next",
    "granitemoehybrid",
    "nemotron_h",
]
#: Those that do not, and one whose learned positions count from the first column.
IGNORING = ["rwkv", "recurrent_gemma", "bart"]


def decoder(kind: str) -> BaseModel:
    return BaseModel(tiny_decoders.tiny_decoder(kind), tiny_tokenizer(True), name=kind)


def check_answers(base: BaseModel, reads_mask: bool) -> None:
    """Answers and logits of rows together are those of rows alone."""
    assert base.batching.reads_mask is reads_mask
    assert base.batching.decodes_together is (base.name != "rwkv")
    alone = [base.generate([prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert base.generate(PROMPTS, max_new_tokens=6) == alone
    assert base.generate(PROMPTS, max_new_tokens=6, batch_size=2) == alone
    for side in ("left", "right"):
        together = base.answer_logits(base.rows(PROMPTS, ["Italy"] * len(PROMPTS), None, side))
        for i, prompt in enumerate(PROMPTS):
            single = base.answer_logits(base.rows([prompt], ["Italy"]))[0]
            torch.testing.assert_close(together[i, : len(single)], single, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["mamba2", "lfm2"])
@torch.no_grad()
def test_recurrent_decoders_that_read_the_mask_are_batched(kind):
    check_answers(decoder(kind), reads_mask=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in RECURRENT if kind not in ("mamba2", "lfm2")])
@torch.no_grad()
def test_all_recurrent_families_that_read_the_mask_stay_right(kind):
    check_answers(decoder(kind), reads_mask=True)


@pytest.mark.parametrize("kind", IGNORING)
@torch.no_grad()
def test_decoders_that_ignore_the_mask_answer_rows_of_one_length_together(kind):
    check_answers(decoder(kind), reads_mask=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "rwkv"])
def test_the_verdict_does_not_depend_on_the_dtype(kind, dtype):
    if kind == "rwkv":
        base = BaseModel(tiny_decoders.tiny_decoder(kind, dtype), tiny_tokenizer(True))
    else:
        base = tiny_base(kind, dtype)
    assert base.batching.reads_mask is (kind != "rwkv")


def test_it_is_tried_once_and_only_where_rows_are_padded(monkeypatch):
    base, calls = tiny_base("llama"), []
    base.model.register_forward_pre_hook(lambda module, args: calls.append(module))
    base.generate(["Rome is"], max_new_tokens=1)
    assert len(calls) == 1
    base.generate(PROMPTS, max_new_tokens=1)
    assert len(calls) == 1 + 3 + 1
    base.generate(PROMPTS, max_new_tokens=1)
    assert len(calls) == 6
    base.model._forward_pre_hooks.clear()


def test_an_applied_edit_does_not_change_the_verdict():
    base = tiny_base("llama")
    with FTM(base, steps=1).edit(REQUESTS[:1]):
        assert base.batching.reads_mask
        assert base.edits.active


def test_rows_keep_their_own_edits_where_they_are_answered_apart():
    base = decoder("rwkv")
    edits = [FTM(base, steps=8, lr=0.05).edit([request]) for request in REQUESTS[:2]]
    carried = [edits[0], None, edits[1], edits[0], None]
    wanted = []
    for prompt, edit in zip(PROMPTS, carried, strict=True):
        with base.edits.carried([edit]):
            wanted += base.generate([prompt], max_new_tokens=5)
    with base.edits.carried(carried):
        assert base.generate(PROMPTS, max_new_tokens=5) == wanted
        assert base.generate(PROMPTS, max_new_tokens=5, batch_size=2) == wanted
        with pytest.raises(UnsupportedUseError, match="give one edit, or None, for each row"):
            base.generate(PROMPTS[:3], max_new_tokens=5)
    assert wanted != base.generate(PROMPTS, max_new_tokens=5)


def test_readings_do_not_depend_on_what_is_read_together():
    base = decoder("rwkv")
    probes = [Probe("rewrite", prompt, ("Italy",)) for prompt in PROMPTS]
    together = Reader(base, Protocol(max_new_tokens=5), "one").base_readings(probes)
    for probe, reading in zip(probes, together, strict=True):
        alone = Reader(base, Protocol(max_new_tokens=5), "two").base_readings([probe])[0]
        assert alone["text"] == reading["text"]


# ---- tokens without an embedding


def with_token(text: str, **kinds: str) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer(True))
    tokenizer.add_special_tokens(kinds or {"additional_special_tokens": [text]})
    return tokenizer


@pytest.mark.parametrize("stop_at_sentence", [False, True])
def test_a_row_has_its_own_room_beside_longer_ones(stop_at_sentence):
    base = tiny_base("llama")
    prompts = ["Rome is", "Rome is in Italy. " * 14, "Lyon is", "Rome is in Italy. " * 16]
    counts = [base.encoder.count_prompt(prompt) for prompt in prompts]
    assert counts[0] < base.max_tokens - 64 < counts[1] < counts[3] < base.max_tokens
    alone = [base.generate([p], stop_at_sentence=stop_at_sentence)[0] for p in prompts]
    together = base.generate(prompts, stop_at_sentence=stop_at_sentence)
    assert together == alone
    assert base.generate(prompts, batch_size=3, stop_at_sentence=stop_at_sentence) == alone
    stop = alone[0][3]
    stopped = [base.generate([p], stop_strings=[stop])[0] for p in prompts]
    assert stopped[0] != alone[0]
    assert base.generate(prompts, stop_strings=[stop]) == stopped
    several = base.generate(prompts, num_beams=2, num_return_sequences=2)
    assert several[:2] == base.generate(prompts[:1], num_beams=2, num_return_sequences=2)


def test_a_padding_token_without_an_embedding_is_replaced():
    plain = tiny_base("llama")
    base = BaseModel(tiny_model("llama"), with_token("[PAD]", pad_token="[PAD]"), name="llama")
    assert base.tokenizer.pad_token_id == embedded_tokens(base.model) == 384
    assert base.pad_id == base.tokenizer.eos_token_id
    assert base.generate(PROMPTS, max_new_tokens=5) == plain.generate(PROMPTS, max_new_tokens=5)
    rows = [b.answer_logits(b.rows(PROMPTS, ["Italy"] * 5)) for b in (base, plain)]
    assert torch.equal(*rows)
    ROME(base, statistics="identity", contexts=2, steps=2).edit(REQUESTS[:2])


def test_resized_embeddings_have_it():
    tokenizer = with_token("[PAD]", pad_token="[PAD]")
    model = tiny_model("llama")
    model.resize_token_embeddings(385)
    assert BaseModel(model, tokenizer).pad_id == 384


def test_a_pad_id_is_found_where_no_special_token_has_an_embedding():
    tokenizer = with_token("[PAD]", pad_token="[PAD]", eos_token="[END]")
    assert BaseModel(tiny_model("llama"), tokenizer).pad_id == 0


@pytest.mark.parametrize(
    "ask",
    [
        lambda base: base.generate(["The <new> Tower is in"]),
        lambda base: base.rows(["Rome is in"], ["<new>"]),
        lambda base: base.encode("The <new> Tower is in", "Rome"),
        lambda base: KeyCollector(base, ["model.layers.1.mlp.down_proj"]).read(["A <new> text"]),
    ],
    ids=["generate", "rows", "encode", "statistics"],
)
def test_any_other_such_token_is_named_with_the_size(ask):
    base = BaseModel(tiny_model("llama"), with_token("<new>"), name="tiny")
    with pytest.raises(InvalidRequestError) as caught:
        ask(base)
    for part in ("'<new>' with id 384", "'tiny' has embeddings of 384 tokens", "resize_token_emb"):
        assert part in str(caught.value)
