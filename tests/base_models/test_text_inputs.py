"""Models that need more than token ids are refused in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_decoders
import torch
import transformers
from support import tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel
from kedit_lightning.base_models.text_inputs import call_parameters
from kedit_lightning.errors import UnsupportedUseError

# tiny settings make some models of transformers complain
pytestmark = pytest.mark.filterwarnings("ignore")


def composite(kind: str, name: str) -> torch.nn.Module:
    model: torch.nn.Module = getattr(transformers, name)(tiny_decoders.tiny_config(kind))
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "name", "missing"),
    [
        ("instructblip", "InstructBlipForConditionalGeneration", "pixel_values and qformer_input"),
        ("kosmos-2", "Kosmos2ForConditionalGeneration", "pixel_values"),
        ("pix2struct", "Pix2StructForConditionalGeneration", "flattened_patches"),
        ("whisper", "WhisperForConditionalGeneration", "input_features"),
    ],
)
def test_pixels_and_sound_that_must_be_given_are_named(kind, name, missing):
    with torch.device("meta"):  # it is refused before it runs
        model = composite(kind, name)
    with pytest.raises(UnsupportedUseError, match=f"type '{kind}' must be given {missing}"):
        BaseModel(model, tiny_tokenizer(True))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("idefics", "IdeficsForVisionText2Text"),
        ("udop", "UdopForConditionalGeneration"),
        ("musicgen", "MusicgenForConditionalGeneration"),
    ],
)
def test_a_model_that_fails_without_other_inputs_says_so(kind, name):
    model: Any = composite(kind, name)
    if model.config.is_encoder_decoder:
        with pytest.raises(UnsupportedUseError, match=r"set model\.config\.decoder_start"):
            BaseModel(model, tiny_tokenizer(True))
        model.config.decoder_start_token_id = 0
    base = BaseModel(model, tiny_tokenizer(True))
    with pytest.raises(UnsupportedUseError, match=rf"'{kind}' does not run on token ids alone \("):
        _ = base.layout.dense_layers
    with pytest.raises(UnsupportedUseError, match=rf"'{kind}' does not run on token ids alone \("):
        base.answer_logits(base.rows(["Rome is in"], ["Italy"]))


def test_of_blip_2_the_language_model_is_the_base_model():
    model: Any = composite("blip-2", "Blip2ForConditionalGeneration")
    base = BaseModel(model, tiny_tokenizer(True))
    assert base.model is model.language_model
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_halves_of_two_vocabularies_are_refused():
    encoder, decoder = tiny_model("bert", torch.float32), tiny_model("gpt2", torch.float32)
    decoder.config.is_decoder = decoder.config.add_cross_attention = True
    other = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(**{**decoder.config.to_dict(), "vocab_size": 400})
    )
    model = transformers.EncoderDecoderModel(encoder=encoder.bert, decoder=other)
    with pytest.raises(UnsupportedUseError, match="reads 384 tokens and its decoder 400"):
        BaseModel(model, tiny_tokenizer(True))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("paligemma", "PaliGemmaForConditionalGeneration"),
        ("internvl", "InternVLForConditionalGeneration"),
    ],
)
def test_the_language_part_of_an_image_text_model_answers_text(kind, name):
    base = BaseModel(composite(kind, name), tiny_tokenizer(True))
    assert base.layout.dense_layers == (0, 1, 2)
    assert base.answer_logits(base.rows(["Rome is in"], ["Italy"])).isfinite().all()


def test_an_error_of_a_model_that_runs_on_text_is_left_as_it_is():
    base = BaseModel(tiny_model("llama"), tiny_tokenizer(True))
    rows = base.rows(["Rome is in"], ["Italy"])
    with pytest.raises(TypeError, match="invalid data type 'str'"):
        base.forward(rows, logits_to_keep="all")


def test_a_wrapper_that_passes_everything_on_is_no_composite():
    model = tiny_model("llama")
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert call_parameters(model) == {}
    assert BaseModel(model, tiny_tokenizer(True)).layout.dense_layers == (0, 1, 2, 3)
