"""The folder of the packaged model: number type, tokenizer, and where an answer ends."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
import transformers
from places import ROOT

PACKAGE = ROOT / "src" / "kedit_lightning"
MODEL, FACTS = PACKAGE / "base_models" / "nano", PACKAGE / "data" / "nano_facts"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, local_files_only=True, dtype=torch.float32
    )
    return loaded.eval()


@pytest.fixture(scope="module")
def sample() -> list[dict[str, str]]:
    lines = (FACTS / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    return random.Random(7).sample([json.loads(line) for line in lines], 200)


def test_the_folder_is_small_and_in_16_bit() -> None:
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    header_size = int.from_bytes(weights.read_bytes()[:8], "little")
    header = json.loads(weights.read_bytes()[8 : 8 + header_size])
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"F16"}


def test_the_tokenizer_adds_bos_once_and_keeps_offsets(tokenizer: Any) -> None:
    text = "The capital of Côte d'Ivoire is"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded.input_ids[0] == tokenizer.bos_token_id == 1
    assert encoded.input_ids.count(1) == 1
    pieces = [text[begin:end] for begin, end in encoded.offset_mapping[1:]]
    assert all(piece == piece.strip() for piece in pieces)
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert tokenizer.padding_side == "right"


def test_an_answer_is_a_token_row_of_its_own(tokenizer: Any, sample: list[dict[str, str]]) -> None:
    # Rows are joined as ids; that must be what the whole text gives.
    for fact in sample:
        head = tokenizer(fact["subject"] + " lives in").input_ids
        tail = tokenizer(" " + fact["object"], add_special_tokens=False).input_ids
        whole = tokenizer(fact["subject"] + " lives in " + fact["object"]).input_ids
        assert head + tail == whole


def test_generation_stops_after_a_sentence(
    model: Any, tokenizer: Any, sample: list[dict[str, str]]
) -> None:
    templates = json.loads((FACTS / "templates.json").read_text(encoding="utf-8"))
    good = 0
    for fact in sample[:20]:
        prompt = templates[fact["relation"]]["train"][0].format(fact["subject"])
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        good += text.startswith(f" {fact['object']}.")
    assert good >= 17
