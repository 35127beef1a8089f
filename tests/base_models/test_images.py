"""Pictures in rows: placeholder tokens, pixel values, padding, subjects, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_base, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from kedit_lightning import BaseModel
from kedit_lightning.base_models.continuation import Continuation
from kedit_lightning.errors import InvalidRequestError, UnsupportedUseError

#: A picture of 8 pixels a side in patches of 4 takes so many tokens.
PATCHES = 4
PROMPTS = ["The Eiffel Tower is in the city of", "Rome is", "What country is Lyon in? It is in"]
ANSWERS = ["Rome", "Italy", "France"]


@pytest.fixture(scope="module")
def vision() -> BaseModel:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer(True).backend_tokenizer.to_str()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    side = {"height": 8, "width": 8}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=side),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        image_token_id=processor.image_token_id,
        pad_token_id=0,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return BaseModel(model.double(), tokenizer, name="llava", processor=processor)


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        pixels = np.random.default_rng(i).integers(0, 255, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return [str(path) for path in paths]


def _direct(base: BaseModel, prompt: str, answer: str, picture: str) -> torch.Tensor:
    """Answer logits of a call of the model with what its processor makes of text and picture."""
    assert base.encoder.images is not None
    processor = base.encoder.images.processor
    with Image.open(picture) as image:
        both, alone = (
            processor(images=[image], text=[f"<image>\n{text}"], return_tensors="pt")
            for text in (f"{prompt} {answer}", prompt)
        )
    both["pixel_values"] = both["pixel_values"].double()
    logits: torch.Tensor = base.model(**both).logits[0]
    return logits[alone["input_ids"].shape[1] - 1 : -1]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_answer_logits_are_those_of_a_direct_call(vision, pictures, side):
    images: list[Any] = [pictures[0], None, pictures[1]]
    rows = vision.rows(PROMPTS, ANSWERS, padding_side=side, images=images)
    assert len([one for one in rows.pictures if one]) == 2
    found = vision.answer_logits(rows)
    for i in (0, 2):
        expected = _direct(vision, PROMPTS[i], ANSWERS[i], images[i])
        torch.testing.assert_close(found[i, : len(expected)], expected, rtol=0, atol=1e-10)
    plain = vision.rows(PROMPTS[1:2], ANSWERS[1:2])
    assert not plain.pictures
    expected = vision.answer_logits(plain)[0]
    torch.testing.assert_close(found[1, : len(expected)], expected, rtol=0, atol=1e-10)
    other = vision.answer_logits(vision.rows(PROMPTS[:1], ANSWERS[:1], images=[pictures[2]]))
    assert not torch.allclose(other[0], found[0, : other.shape[1]], atol=1e-3)


@torch.no_grad()
def test_selected_rows_keep_their_pictures(vision, pictures):
    rows = vision.rows(PROMPTS, ANSWERS, images=[pictures[0], None, pictures[1]])
    some = rows.select(torch.tensor([2, 1]))
    assert [one is not None for one in some.pictures] == [True, False]
    expected = vision.answer_logits(rows)[[2, 1]]
    torch.testing.assert_close(vision.answer_logits(some), expected, rtol=0, atol=1e-10)
    assert "mm_encoder_outputs" not in rows.select(torch.tensor([1])).call


def test_the_subject_is_found_behind_the_placeholders(vision, pictures):
    row = vision.encode(PROMPTS[0], None, "Eiffel Tower", pictures[0])
    assert row.prompt.count(vision.encoder.images.processor.image_token_id) == PATCHES
    assert row.images == (pictures[0],)
    subject = row.prompt[row.subject_start : row.subject_end + 1]
    assert vision.tokenizer.decode(subject).strip() == "Eiffel Tower"
    within = vision.encode("Look: <image> The tower is in", None, "tower", pictures[0])
    assert within.prompt.count(vision.encoder.images.processor.image_token_id) == PATCHES
    span = within.prompt[within.subject_start : within.subject_end + 1]
    assert vision.tokenizer.decode(span).strip() == "tower"


def test_generation_sees_the_picture_and_no_other_row(vision, pictures):
    both = vision.generate(PROMPTS[:2], max_new_tokens=6, images=[pictures[0], None])
    assert both[0] == vision.generate(PROMPTS[:1], max_new_tokens=6, images=pictures[:1])[0]
    assert both[1] == vision.generate(PROMPTS[1:2], max_new_tokens=6)[0]
    assert both[0] != vision.generate(PROMPTS[:1], max_new_tokens=6)[0]


@torch.no_grad()
def test_a_continuation_reads_rows_with_pictures_in_one_piece(vision, pictures):
    row = vision.encode(PROMPTS[0], ANSWERS[0], "Eiffel Tower", pictures[0])
    passes = Continuation(vision, [row], 1)
    places = torch.zeros_like(passes.rows.answer_columns[0]), passes.rows.answer_columns[0]
    expected = vision.answer_logits(vision.pad([row]))[0]
    torch.testing.assert_close(passes.logits_of(places), expected, rtol=0, atol=1e-10)


def test_bad_pictures_are_refused_with_the_reason(vision, pictures, tmp_path):
    with pytest.raises(InvalidRequestError, match=r"image '.*absent\.png' cannot be read"):
        vision.rows(["Rome is"], images=[str(tmp_path / "absent.png")])
    with pytest.raises(InvalidRequestError, match="holds '<image>' 2 times, and has 1 images"):
        vision.rows(["<image> or <image>?"], images=pictures[:1])
    with pytest.raises(UnsupportedUseError, match=r"no processor .* take a vision-language model"):
        tiny_base("llama").rows(["Rome is"], images=pictures[:1])
    with pytest.raises(InvalidRequestError, match="takes 146 tokens"):
        vision.rows(["Rome " * 70], images=pictures[:1])
