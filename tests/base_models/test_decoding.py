"""What a checkpoint's generation config adds to answers is set aside, and only that."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from support import tiny_base

from kedit_lightning import BaseModel, EditTrainer, Probe
from kedit_lightning.base_models.batching import parts_of
from kedit_lightning.benchmark import Protocol, RunContext
from kedit_lightning.benchmark.reader import Reader
from kedit_lightning.data import NanoFacts
from kedit_lightning.decoding_settings import (
    KEPT,
    KNOWN,
    NEUTRAL,
    generation_config,
    in_force,
    set_aside,
)
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import FTM
from kedit_lightning.runs.results import run_facts

PROMPTS = ["The Eiffel Tower is in", "Rome is", "Marie Curie was born in the city of"]
#: What checkpoints ship, and values that would change any answer.
LEAKS: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 5.0},
    "n-grams": {"no_repeat_ngram_size": 1},
    "beams": {"num_beams": 3, "length_penalty": 3.0, "early_stopping": True},
    "banned": {"bad_words_ids": [[i] for i in range(3, 380, 2)]},
    "suppressed": {"suppress_tokens": list(range(3, 380, 2))},
    "suppressed-first": {"begin_suppress_tokens": list(range(3, 380, 2))},
    "forced-last": {"forced_eos_token_id": 2},
    "forced-first": {"forced_bos_token_id": 9},
    "bias": {"sequence_bias": [[[7], 90.0]]},
    "length": {"min_length": 60, "max_length": 9, "min_new_tokens": 20},
    "decay": {"exponential_decay_length_penalty": (1, 9.0)},
    "sampling": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
    "several": {"num_beams": 2, "num_return_sequences": 2},
    "form": {"return_dict_in_generate": True, "output_scores": True},
    "guidance": {"guidance_scale": 3.0},
    "strings": {"stop_strings": ["e"]},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "as-shipped": {
        "do_sample": True,
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "eos_token_id": [2, 3],
        "pad_token_id": 0,
    },
}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base("llama")


@pytest.fixture
def configured(base: BaseModel) -> Iterator[Any]:
    """A function that changes the generation config until the test ends."""
    before = copy.deepcopy(base.model.generation_config)

    def configure(**settings: Any) -> None:
        config = copy.deepcopy(before)
        for name, value in settings.items():
            setattr(config, name, value)
        base.model.generation_config = config

    yield configure
    base.model.generation_config = before


@pytest.mark.parametrize("name", LEAKS)
def test_nothing_of_it_reaches_an_answer(base, configured, name, caplog):
    plain = base.generate(PROMPTS, max_new_tokens=12)
    configured(**LEAKS[name])
    before = base.model.generation_config.to_dict()
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        assert base.generate(PROMPTS, max_new_tokens=12) == plain
    transformers.utils.logging.disable_propagation()
    assert not caplog.messages, "nor is anything said about it"
    assert base.model.generation_config.to_dict() == before, "the config stays as it was"


@pytest.mark.parametrize(
    "name", ["penalty", "n-grams", "beams", "banned", "suppressed", "bias", "strings"]
)
def test_it_acts_where_that_is_asked_for(base, configured, name):
    plain = base.generate(PROMPTS, max_new_tokens=12)
    configured(**LEAKS[name])
    ids = base.rows(PROMPTS[:1], padding_side="left").inputs
    wanted = base.model.generate(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        max_new_tokens=12,
        tokenizer=base.tokenizer,
    )[0, ids["input_ids"].shape[1] :]
    answers = base.generate(PROMPTS, max_new_tokens=12, generation="model")
    assert answers[0] == base.tokenizer.decode(wanted, skip_special_tokens=True)
    if name != "beams":
        assert answers != plain
    assert base.generate(PROMPTS, max_new_tokens=12, **LEAKS[name]) == answers, "as options do"


def test_answers_are_never_sampled_unasked(base, configured):
    configured(do_sample=True, temperature=50.0, top_k=0)
    plain = base.generate(PROMPTS, max_new_tokens=8)
    assert base.generate(PROMPTS, max_new_tokens=8, generation="model") == plain
    torch.manual_seed(0)
    sampled = base.generate(PROMPTS, max_new_tokens=8, do_sample=True, top_k=0, temperature=50.0)
    assert sampled != plain


def test_all_end_tokens_of_the_checkpoint_end_an_answer(base, configured):
    (plain,) = base.generate(PROMPTS[:1], max_new_tokens=12)
    rows = base.rows(PROMPTS[:1], padding_side="left").inputs
    ids = base.model.generate(
        input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], max_new_tokens=12
    )[0, rows["input_ids"].shape[1] :].tolist()
    last = ids[3]
    configured(eos_token_id=[2, last])
    answers = base.generate(PROMPTS, max_new_tokens=12)
    assert answers[0] == base.tokenizer.decode(ids[: ids.index(last) + 1])
    assert answers[0] != plain


def test_padding_behind_an_answer_is_no_part_of_it(base, configured):
    """Also where the token of the padding is an ordinary one, as without a padding token."""
    rows = base.rows(PROMPTS[:1], padding_side="left").inputs
    ids = base.model.generate(
        input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], max_new_tokens=12
    )[0, rows["input_ids"].shape[1] :].tolist()
    configured(eos_token_id=ids[2])
    alone = [base.generate([prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert base.tokenizer.decode([70])
    assert base.generate(PROMPTS, max_new_tokens=12, pad_token_id=70) == alone


def test_an_encoder_decoder_says_no_forced_token():
    base = tiny_base("t5")
    plain = base.generate(PROMPTS, max_new_tokens=6)
    base.model.generation_config.forced_bos_token_id = 9
    assert base.generate(PROMPTS, max_new_tokens=6) == plain
    assert base.generate(PROMPTS, max_new_tokens=6, generation="model") != plain


def test_every_setting_of_transformers_is_known():
    fields = {n for n in transformers.GenerationConfig().to_dict() if not n.startswith("_")}
    assert not fields - KNOWN, "decide in decoding_settings.py whether they change an answer"
    defaults = transformers.GenerationConfig._get_default_generation_params()
    assert {n: NEUTRAL[n] for n in defaults if n in NEUTRAL} | {"max_length": 20} == {
        n: value for n, value in defaults.items() if n in NEUTRAL
    }
    assert not KEPT & NEUTRAL.keys()


def test_what_is_set_aside_and_what_acts():
    config = {**LEAKS["as-shipped"], "use_cache": True, "max_length": 20, "num_beams": 1}
    aside = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8}
    assert set_aside(config) == {**aside, "top_k": 20, "max_length": 20}
    assert in_force(config) == {"eos_token_id": [2, 3]}
    assert "repetition_penalty" not in set_aside(config, "model")
    assert in_force(config, "model") == {"eos_token_id": [2, 3], "repetition_penalty": 1.05}
    with pytest.raises(UnsupportedUseError, match="greedy, model, got 'beams'"):
        set_aside(config, "beams")  # type: ignore[arg-type]


def test_rows_are_cut_into_parts_in_order():
    assert parts_of([], 4, alike=False) == []
    assert parts_of([5, 3, 5, 5, 3], 2, alike=True) == [[0, 2], [3], [1, 4]]


# ---- benchmark


def test_a_protocol_names_it():
    assert Protocol().facts()["generation"] == "greedy"
    assert Protocol().id != Protocol(generation="model").id
    assert Protocol(generate=False).id == Protocol(generate=False, generation="model").id
    with pytest.raises(UnsupportedUseError, match=r"protocol.generation must be one of greedy, m"):
        Protocol(generation="beams")  # type: ignore[arg-type]


def test_answers_under_two_settings_are_kept_apart(base, configured):
    def path(generation: str = "greedy") -> Any:
        return Reader(base, Protocol(generation=generation), "data").cache.path  # type: ignore[arg-type]

    plain = path()
    configured(repetition_penalty=1.1, sequence_bias=[[[7], 9.0]])
    assert path() == plain, "under greedy it changes no answer"
    assert path("model") != plain
    first = path("model")
    configured(repetition_penalty=1.2)
    assert path("model") != first
    configured(eos_token_id=[2, 3])
    assert path() != plain, "the end of an answer does"


def test_readings_are_those_of_the_setting(base, configured):
    probe = Probe("rewrite", PROMPTS[0], ("Rome",))
    plain = Reader(base, Protocol(max_new_tokens=8)).base_readings([probe])[0]
    configured(**LEAKS["penalty"])
    assert Reader(base, Protocol(max_new_tokens=8)).base_readings([probe])[0] == plain
    other = Reader(base, Protocol(max_new_tokens=8, generation="model")).base_readings([probe])[0]
    assert other["text"] != plain["text"]


def test_results_say_what_was_set_aside(base, configured):
    configured(repetition_penalty=1.05, temperature=0.7, do_sample=True)
    method = FTM(base, steps=1)
    greedy = run_facts(method, base, RunContext(), {})
    sampling = {"temperature": 0.7, "do_sample": True}
    assert greedy["protocol"]["set_aside"] == {"repetition_penalty": 1.05, **sampling}
    model = run_facts(method, base, RunContext(Protocol(generation="model")), {})
    assert model["protocol"]["set_aside"] == sampling
    assert model["base_model"]["decoding"]["repetition_penalty"] == 1.05
    assert "generation config" in model["metric_protocol"]["free_answers"]
    json.dumps([greedy, model])


@pytest.mark.slow
def test_scores_on_nano_do_not_move():
    seen = []
    for settings in ({}, {"repetition_penalty": 1.1}, LEAKS["beams"], LEAKS["n-grams"]):
        base = BaseModel.load("nano")
        for name, value in settings.items():
            setattr(base.model.generation_config, name, value)
        assert generation_config(base.model).items() >= settings.items()
        trainer = EditTrainer(logger=False, enable_progress_bar=False)
        seen += trainer.test(FTM(base), NanoFacts(limit=5), verbose=False)
    names = [name for name in seen[0] if "gen" in name]
    assert names
    for scores in seen[1:]:
        assert {n: scores[n] for n in names} == {n: seen[0][n] for n in names}
