"""The packaged vision-language model knows its drawings, is small, and can be edited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kedit_lightning import BaseModel, Edit, EditTrainer
from kedit_lightning.base_models.spec import resolve
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import Shapes
from kedit_lightning.data.multimodal.drawing import Drawing
from kedit_lightning.errors import DataFileError
from kedit_lightning.image_reference import content_hash, settled
from kedit_lightning.methods import FTM, GRACE, IKE
from kedit_lightning.requests import EditExample

FOLDER = Path(resolve("shapes"))
FACTS = FOLDER.parents[1] / "data" / "shapes_facts"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.load("shapes")


@pytest.fixture(scope="module")
def examples() -> list[EditExample]:
    return Shapes(limit=12).examples()


@torch.no_grad()
def right(base: BaseModel, asked: list[tuple[str, str, str | None]]) -> list[bool]:
    """Which answers have arg-max tokens alone, of prompts, answers and pictures."""
    prompts, answers, images = zip(*asked, strict=True)
    rows = base.rows(prompts, answers, images=images)
    hits = (base.answer_logits(rows).argmax(-1) == rows.answer_ids) | ~rows.answer_mask
    return hits.all(1).tolist()


def test_it_is_small_and_computes_in_float32(base):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6e6
    assert base.dtype == torch.float32


def test_a_fact_about_a_picture_is_changed_kept_apart_and_undone(base, examples):
    example = examples[0]
    (fact,) = example.requests
    probes = {(p.kind, p.group): p for p in example.probes}
    again = probes["rephrase", "image"]
    others = [
        (p.prompt, p.answers[0], p.image) for (kind, _), p in probes.items() if kind == "locality"
    ]
    old, new = (
        [(q.prompt, answer, q.image) for q in (fact, again)]
        for answer in (str(fact.target_old), fact.target_new)
    )
    blank = settled(Drawing(1).image())
    rows = base.rows([fact.prompt] * 2, [fact.target_new] * 2, images=[fact.image, blank])
    with torch.no_grad():
        before = base.answer_logits(rows)
    assert all(right(base, [*old, *others, (fact.prompt, "nothing", blank)]))
    with GRACE(base, layer=1).edit([fact]):
        assert right(base, new[:1]) == [True]
        assert all(right(base, others))
        assert right(base, [(fact.prompt, "nothing", blank)]) == [True]
        with torch.no_grad():  # no part of the edit is about the question alone
            assert torch.equal(base.answer_logits(rows)[1], before[1])
    with FTM(base, lr=5e-3).edit([fact]):
        assert all(right(base, new))  # the other drawing of the same, too
    with torch.no_grad():
        assert torch.equal(base.answer_logits(rows), before)


def test_ike_finds_facts_by_what_pictures_show(base, examples, tmp_path):
    """Two facts with one question; of other drawings of the same each finds its own."""
    first, second = (
        e for e in (examples[0], examples[4]) if e.requests[0].prompt == "What colour is it?"
    )
    facts = [e.requests[0] for e in (first, second)]
    probes = [{(p.kind, p.group): p for p in e.probes} for e in (first, second)]
    again = [own["rephrase", "image"].image for own in probes]
    other = probes[0]["locality", "image"].image

    def stated() -> list[str]:
        rows = [base.encode(facts[0].prompt, image=image) for image in (*again, other, None)]
        texts = [base.tokenizer.decode(row.prompt) for row in rows]
        return [text.partition("New Fact: ")[2].partition("\n")[0] for text in texts]

    expected = [f"{fact.prompt} {fact.target_new}" for fact in facts]
    edit = IKE(base, demonstrations=0, picture_similarity=0.9).edit(facts)
    edit.save(tmp_path / "edit.safetensors")
    with edit:
        assert [text.strip() for text in stated()] == [*expected, "", ""]
    with Edit.load(tmp_path / "edit.safetensors", base) as loaded:
        assert loaded.id == edit.id
        assert [text.strip() for text in stated()] == [*expected, "", ""]
    with IKE(base, demonstrations=0).edit(facts):  # by words alone the latest is as near
        assert [text.strip() for text in stated()] == [expected[1]] * 4


def test_records_are_drawn_alike_and_ask_about_other_pictures(examples):
    (again,) = Shapes(limit=1).examples()
    assert again == examples[0]
    for example in examples:
        (fact,) = example.requests
        seen = {(p.kind, p.group): p.image for p in example.probes}
        assert seen["rephrase", "text"] == seen["locality", "same"] == fact.image
        assert seen["locality", "text"] is None
        pictures = [fact.image, seen["rephrase", "image"]]
        pictures += [seen["locality", group] for group in ("image", "near")]
        assert len({content_hash(str(image)) for image in pictures}) == 4
    lines = (FACTS / "train.jsonl").read_text(encoding="utf-8").splitlines()
    learned = {_content(json.loads(line)["image"]) for line in lines}
    lines = (FACTS / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert not learned & {_content(json.loads(line)["image"]) for line in lines}


def _content(image: dict[str, object]) -> tuple[object, ...]:
    return tuple(image[name] for name in ("colour", "shape", "count", "place"))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"colour": "mauve"}, r"describes no drawing \(colour\)"), ({"seed": "one"}, r"\(seed\)")],
)
def test_descriptions_that_do_not_fit_are_refused(tmp_path, change, said):
    record = json.loads((FACTS / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    record["image"] |= change
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    with pytest.raises(DataFileError, match=f"field 'image' {said}|field 'image' .*{said}"):
        Shapes(path).examples()


@pytest.mark.slow
def test_editors_write_facts_about_pictures(base):
    for name, method in (("FTM", FTM(base, lr=5e-3)), ("GRACE", GRACE(base, layer=1))):
        trainer = EditTrainer(
            protocol=Protocol(mode="single", generate=False),
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
        )
        (scores,) = trainer.test(method, Shapes(limit=12), verbose=False)
        assert scores["rewrite/tf_all"] >= 0.9
        if name == "GRACE":
            assert scores["locality/image/keep_top1"] >= 0.8
            assert scores["locality/text/keep_top1"] == 1
