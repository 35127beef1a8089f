"""Rows with pictures, and edits with them, in vision-language models of eleven families."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision import BUILDERS, draw, vision_base, vision_folder
from transformers.image_utils import load_image

from kedit_lightning import BaseModel, Edit, EditRequest
from kedit_lightning.edits import DenseEdit
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import FTM, MEND, ROME

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["The Eiffel Tower is in the city of", "Rome is", "What country is Lyon in? It is in"]
ANSWERS = ["Rome", "Italy", "France"]
EXACT = {"rtol": 0, "atol": 1e-9}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    return [draw(folder / f"{i}.png", i) for i in range(3)]


@pytest.fixture(scope="module", params=BUILDERS)
def base(request: Any) -> BaseModel:
    return vision_base(request.param)


@torch.no_grad()
def direct(base: BaseModel, prompt: str, answer: tuple[int, ...], picture: str) -> torch.Tensor:
    """Answer logits of the model's own call on what its processor makes of prompt and picture."""
    images: Any = base.encoder.images
    text = prompt if images._places_itself else f"{images.marker}{prompt}"
    values = images._call(text, [load_image(picture)], True)
    width = values["input_ids"].shape[1]
    whole = base.sight._model
    taken = frozenset(inspect.signature(whole.forward).parameters)
    inputs: dict[str, Any] = {}
    for name, value in values.items():
        if base.is_encoder_decoder and name in ("input_ids", "attention_mask"):
            inputs[name] = value
        elif name == "input_ids":
            inputs[name] = torch.cat([value, torch.tensor([answer])], dim=1)
        elif name.endswith("token_type_ids"):
            # PaliGemma reads prompts as a whole and answers, of another type, token by token.
            fill = int(base.name == "paligemma")
            inputs[name] = torch.cat([value, torch.full((1, len(answer)), fill)], dim=1)
        elif name == "cross_attention_mask":
            inputs[name] = torch.cat([value, *[value[:, -1:]] * len(answer)], dim=1)
        elif name in taken and name not in ("attention_mask", "labels"):
            inputs[name] = value.double() if value.is_floating_point() else value
    if base.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([(0, *answer[:-1])])
        return whole(**inputs).logits[0]
    return whole(**inputs).logits[0, width - 1 : -1]


@torch.no_grad()
def test_rows_with_and_without_pictures_answer_as_direct_calls_do(base, pictures):
    images: list[Any] = [pictures[0], None, pictures[1]]
    left, right = (
        base.rows(PROMPTS, ANSWERS, padding_side=side, images=images) for side in ("left", "right")
    )
    found = base.answer_logits(left)
    for i in (0, 2):
        row = base.encode(PROMPTS[i], ANSWERS[i], image=images[i])
        expected = direct(base, PROMPTS[i], row.answer, images[i])
        # Rotary angles are float32, and PaliGemma counts positions from another number.
        torch.testing.assert_close(found[i, : len(expected)], expected, rtol=0, atol=1e-7)
    alone = base.answer_logits(base.rows(PROMPTS[1:2], ANSWERS[1:2]))[0]
    torch.testing.assert_close(found[1, : len(alone)], alone, **EXACT)
    mask = left.answer_mask[..., None]
    torch.testing.assert_close(base.answer_logits(right) * mask, found * mask, **EXACT)
    some = right.select(torch.tensor([2, 1]))
    torch.testing.assert_close(
        base.answer_logits(some) * mask[[2, 1]], (found * mask)[[2, 1]], **EXACT
    )


@torch.no_grad()
def test_cached_features_are_those_of_a_new_pass_bit_for_bit(base, pictures):
    if base.name.startswith("blip2"):
        with pytest.raises(UnsupportedUseError, match="'blip-2' reads one picture a prompt"):
            base.rows(PROMPTS[:1], images=[(pictures[0], pictures[1])])
        pair, others = (pictures[0],), [(pictures[2],)]
    else:
        pair = (pictures[0], pictures[1])
        others = [(pictures[1], pictures[0]), (pictures[0], pictures[2])]
    rows = base.rows(PROMPTS[:1], ANSWERS[:1], images=[pair])
    again = base.rows(PROMPTS[:1], ANSWERS[:1], images=[pair])
    assert again.pictures[0] is rows.pictures[0]  # computed once
    assert base.encoder.images is not None
    assert base.encoder.images.seen((pictures[0],)).values  # and so is the processor's work
    base.sight.cached = False
    try:
        online = base.rows(PROMPTS[:1], ANSWERS[:1], images=[pair])
    finally:
        base.sight.cached = True
    assert online.pictures[0] is not rows.pictures[0]
    assert torch.equal(base.answer_logits(online), base.answer_logits(rows))
    # Their order counts, and another picture is another question.
    for other in others:
        moved = base.answer_logits(base.rows(PROMPTS[:1], ANSWERS[:1], images=[other]))
        assert (moved - base.answer_logits(rows)).abs().max() > 1e-5


def test_generation_sees_the_picture_of_its_row_alone(base, pictures):
    both = base.generate(PROMPTS[:2], 5, images=[pictures[0], None])
    assert both[:1] == base.generate(PROMPTS[:1], 5, images=pictures[:1])
    assert both[1:] == base.generate(PROMPTS[1:2], 5)


def test_an_edit_about_a_picture_takes_rolls_back_and_loads(base, pictures, tmp_path):
    requests = [
        EditRequest("What is this? It is a", " tower", image=pictures[0]),
        EditRequest(PROMPTS[0], " Rome"),
    ]
    rows = base.rows(
        [r.prompt for r in requests],
        [r.target_new for r in requests],
        images=[r.image for r in requests],
    )

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return base.answer_logits(rows)

    before, known = logits(), base.answer_log_probs(rows).sum(-1)
    if base.is_encoder_decoder:  # MEND lifts a target there once it is trained
        method: Any = MEND(base, checkpoint="none", edit_lr=1e-2)
    else:
        method = FTM(base, lr=5e-2, steps=20)
    edit = method.edit(requests)
    assert torch.equal(logits(), before)
    with edit:
        under = logits()
        lifted = base.answer_log_probs(rows).sum(-1) - known
        assert (lifted > (0 if base.is_encoder_decoder else 2)).all()
    assert torch.equal(logits(), before)
    edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors", base) as loaded:
        assert loaded.origin.requests[0].image == pictures[0]
        assert torch.equal(logits(), under)
    assert torch.equal(logits(), before)


@torch.no_grad()
def test_rows_with_one_picture_and_two_attend_to_their_own(pictures):
    base = vision_base("mllama")
    images = [pictures[0], (pictures[1], pictures[2]), None]
    together = base.answer_logits(base.rows(PROMPTS, ANSWERS, images=images))
    for i, image in enumerate(images):
        alone = base.answer_logits(
            base.rows(PROMPTS[i : i + 1], ANSWERS[i : i + 1], images=[image])
        )
        torch.testing.assert_close(together[i, : alone.shape[1]], alone[0], **EXACT)
    seen = base.rows(PROMPTS[1:2], ANSWERS[1:2], images=[pictures[1]])
    assert (
        base.answer_logits(seen)[0] - together[1, : seen.answer_ids.shape[1]]
    ).abs().max() > 1e-5


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_rome_writes_a_subject_named_beside_a_picture(kind, pictures):
    base = vision_base(kind)
    fact = EditRequest(PROMPTS[0], " Rome", subject="Eiffel Tower", image=pictures[0])
    rows = base.rows([fact.prompt], [fact.target_new], images=[fact.image])
    with torch.no_grad():
        before = base.answer_log_probs(rows).sum()
        edit = ROME(base, layer=1, contexts=2, clamp=50.0).edit([fact])
        with edit:
            assert base.answer_log_probs(rows).sum() > before + 0.1
        assert base.answer_log_probs(rows).sum() == before


@torch.no_grad()
@torch.no_grad()
@pytest.mark.parametrize("kind", ["blip2_opt", "blip2_t5"])
def test_a_placeholder_without_a_picture_is_a_token(kind, pictures):
    base = vision_base(kind)
    token, images = base.sight._token, [None, pictures[0]]
    row = base.encoder.encode("Rome is", "Italy")
    named = replace(row, prompt=(*row.prompt, token))
    seen = base.encode(PROMPTS[0], ANSWERS[0], image=images[1])
    together, alone = base.pad([named, seen]), base.pad([named])
    width = len(named.answer)
    torch.testing.assert_close(
        base.answer_logits(together)[0, :width], base.answer_logits(alone)[0], **EXACT
    )
    own = base.answer_logits(base.pad([seen]))[0]
    torch.testing.assert_close(base.answer_logits(together)[1, : len(own)], own, **EXACT)
    embeddings = base.model.get_input_embeddings()
    step = torch.tensor([[3], [token]])
    with base.sight.embedded(together):  # one that the model itself has written
        assert torch.equal(embeddings(step), embeddings.weight[step])


def test_text_alone_is_read_as_the_text_model_reads_it():
    from transformers import LlamaForCausalLM

    base = vision_base("llava")
    text = LlamaForCausalLM(base.model.config.text_config).double()
    text.model.load_state_dict(base.model.model.language_model.state_dict())
    text.lm_head.load_state_dict(base.model.lm_head.state_dict())
    plain = BaseModel(text, base.tokenizer, name="text")
    for side in ("left", "right"):
        rows = [b.rows(PROMPTS, ANSWERS, padding_side=side) for b in (base, plain)]
        assert torch.equal(base.answer_logits(rows[0]), plain.answer_logits(rows[1]))
    edits = [
        FTM(b, lr=5e-3, steps=20).edit([EditRequest(PROMPTS[0], " Rome")]) for b in (base, plain)
    ]
    deltas = [next(iter(edit.deltas().values())) for edit in edits]
    assert torch.equal(*deltas)


def test_features_follow_changed_files_and_can_be_trained_with(tmp_path):
    base, path = vision_base("llava"), draw(tmp_path / "a.png", 1)
    with torch.inference_mode():
        old = base.rows(PROMPTS[:1], ANSWERS[:1], images=[path])
    assert not old.pictures[0].features.pooler_output[0].is_inference()
    draw(tmp_path / "a.png", 2, width=13)
    new = base.rows(PROMPTS[:1], ANSWERS[:1], images=[path])
    fresh = base.rows(PROMPTS[:1], ANSWERS[:1], images=[draw(tmp_path / "b.png", 2, width=13)])
    logits = [base.answer_logits(rows) for rows in (old, new, fresh)]
    assert torch.equal(logits[1], logits[2])
    assert not torch.equal(logits[0], logits[1])


@torch.no_grad()
def test_features_follow_changed_weights_and_edits_of_the_tower(pictures):
    base = vision_base("llava")
    rows = base.rows(PROMPTS[:1], ANSWERS[:1], images=pictures[:1])
    name = "model.multi_modal_projector.linear_1"
    tower = base.module(name).weight
    tower.mul_(2.0)
    changed = base.rows(PROMPTS[:1], ANSWERS[:1], images=pictures[:1])
    tower.mul_(0.5)
    assert not torch.equal(base.answer_logits(changed), base.answer_logits(rows))
    with DenseEdit(base, {name: (tower.clone(), None)}):  # what it sees now is not remembered
        edited = base.picture_vector(pictures[:1])
    again = base.rows(PROMPTS[:1], ANSWERS[:1], images=pictures[:1])
    assert torch.equal(base.answer_logits(again), base.answer_logits(rows))
    assert base.picture_vector(pictures[:1]) != edited


def test_a_saved_vision_language_model_loads_with_its_processor(tmp_path: Path, pictures):
    base = vision_base("llava")
    loaded = BaseModel.load(vision_folder(tmp_path))
    assert type(loaded.model) is type(base.model)
    rows = [b.rows(PROMPTS[:1], ANSWERS[:1], images=pictures[:1]) for b in (base, loaded)]
    with torch.no_grad():
        assert torch.equal(base.answer_logits(rows[0]), loaded.answer_logits(rows[1]))
