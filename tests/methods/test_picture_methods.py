"""Editors on requests about pictures: runs on E-VQA, memories that tell pictures apart, MEND."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_support import fit
from hypernetwork_support import SMALL
from PIL import Image
from places import ROOT
from tiny_vision import draw, vision_base

from kedit_lightning import BaseModel, Edit, EditRequest, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import EIC, EVQA
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import (
    DEFER,
    FTL,
    FTM,
    GRACE,
    IKE,
    KE,
    MALMEN,
    MELO,
    MEMOIR,
    MEND,
    SERAC,
    WISE,
    AlphaEdit,
    AnyEdit,
    LoRA,
    TPatcher,
    UnKE,
)
from kedit_lightning.methods.hypernetwork.shared.outer_loss import outer_losses
from kedit_lightning.methods.locate.shared.answer_windows import AnswerWindows
from kedit_lightning.methods.memory.serac.scope_gradient import scope_gradient
from kedit_lightning.methods.training.episodes import make_episodes
from kedit_lightning.metrics.functional import rank_agreement
from kedit_lightning.requests import EditExample

pytestmark = pytest.mark.filterwarnings("ignore")
SAMPLES = ROOT / "tests" / "samples" / "published"
QUESTION = "What is this? It is a"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return vision_base("llava")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    return [draw(folder / f"{i}.png", i) for i in range(2)]


def _logits(base: BaseModel, *images: str | None) -> torch.Tensor:
    count = len(images)
    with torch.no_grad():
        rows = base.rows([QUESTION] * count, [" tower"] * count, images=images)
        return base.answer_logits(rows)


def _test(method: Any, data: Any, **protocol: Any) -> dict[str, float]:
    trainer = EditTrainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        protocol=Protocol(**(protocol or {"mode": "single", "generate": False})),
    )
    (scores,) = trainer.test(method, data, verbose=False)
    return dict(scores)


@pytest.mark.parametrize("data", [EVQA, EIC])
def test_a_run_scores_the_five_kinds_of_probe(base, data, tmp_path):
    file = "vqa_eval.json" if data is EVQA else "caption_eval_edit.json"
    before = _logits(base, None)
    scores = _test(FTM(base, lr=5e-2, steps=20), data(SAMPLES / file))
    assert torch.equal(_logits(base, None), before)
    assert scores["rewrite/tf_tok"] > 0.5
    for name in ("rephrase/text", "rephrase/image"):
        assert 0 <= scores[f"{name}/tf_tok"] <= 1
    for name in ("locality/text", "locality/image"):
        assert scores[f"{name}/kl"] > 0
    same = _test(FTM(base, lr=1e-30, steps=1), data(SAMPLES / file))
    for name in ("locality/text", "locality/image"):
        assert same[f"{name}/keep_top1"] == 1
        assert same[f"{name}/kl"] < 1e-12


def test_legacy_scores_compare_all_positions_in_the_order_of_ranks(base):
    legacy = {"mode": "single", "generate": False, "scoring": "legacy_easyedit"}
    found = [
        _test(FTM(base, lr=lr, steps=steps), EVQA(SAMPLES / "vqa_eval.json"), **legacy)
        for lr, steps in ((5e-2, 20), (1e-30, 1))
    ]
    for scores, kept in zip(found, (False, True), strict=True):
        for group in ("text", "image"):
            top1, top10 = (scores[f"locality/{group}_{name}"] for name in ("top1", "top10"))
            assert (top1 == top10 == 1) if kept else top10 < 0.9
    assert found[0]["rewrite_acc"] > found[1]["rewrite_acc"]


def test_grace_tells_pictures_apart(base, pictures):
    before = _logits(base, pictures[0], pictures[1], None)
    fact = EditRequest(QUESTION, " tower", image=pictures[0])
    with GRACE(base, layer=1, radius=1e-3, steps=30).edit([fact]):
        after = _logits(base, pictures[0], pictures[1], None)
    assert not torch.allclose(after[0], before[0], atol=1e-3)
    assert torch.equal(after[1:], before[1:])


METHODS: list[tuple[type[Any], dict[str, Any]]] = [
    (LoRA, {"lr": 5e-2, "steps": 20}),
    (WISE, {"contexts": 1, "irrelevant": 2, "steps": 20}),
    (MEMOIR, {"contexts": 1, "steps": 20}),
    (DEFER, {"steps": 30}),
    (MELO, {"steps": 30}),
    (IKE, {"demonstrations": 0}),
    (UnKE, {"layer": 1, "steps": 5, "value_steps": 10, "texts": 2}),
    (AnyEdit, {"statistics": "identity", "preserve": 1e-3, "steps": 20, "layers": [1]}),
]


@pytest.mark.parametrize(("method", "settings"), METHODS, ids=[m.__name__ for m, _ in METHODS])
def test_an_edit_about_a_picture_acts_rolls_back_and_loads(
    base, pictures, tmp_path: Path, method, settings
):
    before = _logits(base, pictures[0], None)
    edit = method(base, **settings).edit([EditRequest(QUESTION, " tower", image=pictures[0])])
    assert torch.equal(_logits(base, pictures[0], None), before)
    with edit:
        after = _logits(base, pictures[0], None)
        assert not torch.allclose(after[0], before[0], atol=1e-4)
    edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors", base):
        assert torch.equal(_logits(base, pictures[0], None), after)
    assert torch.equal(_logits(base, pictures[0], None), before)


SHARED: list[tuple[type[Any], dict[str, Any]]] = [
    (FTL, {"lr": 5e-2, "steps": 20}),
    (AlphaEdit, {"layers": [1], "statistics": "identity", "contexts": 2, "clamp": 50.0}),
    (KE, {"checkpoint": "none", "max_scale": 1.0}),
    (MALMEN, {"checkpoint": "none", "edit_lr": 1e-2}),
]


@pytest.mark.parametrize(("method", "settings"), SHARED, ids=[m.__name__ for m, _ in SHARED])
def test_what_is_computed_from_a_picture_follows_it_and_rolls_back(
    base, pictures, method, settings
):
    before = _logits(base, pictures[0], None)
    subject = "this" if method is AlphaEdit else None
    editor = method(base, **settings)
    edits = [
        editor.edit([EditRequest(QUESTION, " tower", subject=subject, image=image)])
        for image in pictures
    ]
    # Another picture is another edit: the computation has seen it.
    first, second = (next(iter(edit.deltas().values())) for edit in edits)
    assert not torch.allclose(first, second, rtol=1e-3, atol=1e-12)
    lifted = []
    for edit in edits:
        with edit:
            lifted.append(_logits(base, pictures[0], None) - before)
        assert torch.equal(_logits(base, pictures[0], None), before)
    assert all(lift.abs().max() > 1e-4 for lift in lifted)
    if method in (FTL, AlphaEdit):  # the hypernetworks are untrained
        rows = base.rows([QUESTION], [" tower"], images=pictures[:1])
        known = base.answer_log_probs(rows).sum()
        with edits[0]:
            assert base.answer_log_probs(rows).sum() > known + 0.1


def test_an_edit_about_a_picture_answers_less_about_a_blank_one(base, pictures, tmp_path):
    """The control that shows whether an edit hangs on the picture, or on the question alone."""
    with Image.open(pictures[0]) as picture:
        blank = Image.new("RGB", picture.size, (128, 128, 128))
    blank.save(tmp_path / "blank.png")
    asked = (pictures[0], str(tmp_path / "blank.png"))
    rows = base.rows([QUESTION] * 2, [" tower"] * 2, images=asked)
    assert [len(row.images) for row in (base.encode(QUESTION, image=i) for i in asked)] == [1, 1]
    with torch.no_grad():
        known = base.answer_log_probs(rows).sum(-1)
        fact = EditRequest(QUESTION, " tower", image=pictures[0])
        with FTM(base, lr=5e-3, steps=20).edit([fact]):
            lift = base.answer_log_probs(rows).sum(-1) - known
        assert lift[0] > 1
        assert lift[1] < lift[0] - 0.05
        with GRACE(base, layer=1, radius=1e-3, steps=30).edit([fact]):
            lift = base.answer_log_probs(rows).sum(-1) - known
        assert lift[0] > 1
        assert lift[1] == 0  # no part of it is about the question alone


def test_ike_states_the_fact_of_the_picture_that_is_asked_about(base, pictures, tmp_path):
    facts = [
        EditRequest(QUESTION, answer, image=image)
        for answer, image in ((" tower", pictures[0]), (" bridge", pictures[1]))
    ]
    asked = (pictures[0], pictures[1], None)

    def stated() -> list[str]:
        rows = [base.encode(QUESTION, image=image) for image in asked]
        texts = [base.tokenizer.decode(row.prompt) for row in rows]
        return [next(w for w in ("tower", "bridge", "") if w in text) for text in texts]

    assert stated() == ["", "", ""]
    edit = IKE(base, demonstrations=0).edit(facts)
    with edit:
        assert stated() == ["tower", "bridge", "bridge"]  # of equals the latest
    edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors", base) as loaded:
        assert loaded.id == edit.id
        assert stated() == ["tower", "bridge", "bridge"]
    text = EditRequest("What is that? It is a", " gate")
    with IKE(base, demonstrations=0).edit([text, *facts]):
        assert stated()[:2] == ["tower", "bridge"]
        assert "gate" in base.tokenizer.decode(base.encode(QUESTION).prompt)


def test_mend_learns_from_pictures(base, tmp_path):
    data = EVQA(SAMPLES / "vqa_eval.json", train_path=SAMPLES / "vqa_eval.json")
    method = MEND(base, **{"checkpoint": "none", **SMALL, "n_rephrases": 2, "n_locality": 2})
    method.configure_model()
    (first, *_) = make_episodes(data.examples(), 1, 0, 0, 2, 2)
    blind = [replace(probe, image=None) for probe in first.asked]
    seen, unseen = (
        outer_losses(base, [episode], {}, {})
        for episode in (first, replace(first, asked=tuple(blind)))
    )
    assert abs(float(seen.edit - unseen.edit)) > 1e-3
    before = {name: value.clone() for name, value in method.network.state_dict().items()}
    fit(method, tmp_path, source=data)
    after = method.network.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    request = data.examples()[0].requests[0]
    plain = _logits(base, str(request.image))
    with method.edit([request]) as edit:
        assert edit.origin.requests[0].image == request.image
        assert not torch.equal(_logits(base, str(request.image)), plain)
    assert torch.equal(_logits(base, str(request.image)), plain)


def test_serac_tells_pictures_apart_and_learns_from_them(base, pictures, tmp_path):
    asked = (pictures[0], pictures[1], None)
    before = _logits(base, *asked)
    fact = EditRequest(QUESTION, " tower", image=pictures[0])
    # Untrained, so that only the question itself is in scope.
    edit = SERAC(base, checkpoint="none", threshold=0.999).edit([fact])
    edit.save(tmp_path / "edit.safetensors")
    with edit:
        after = _logits(base, *asked)
    assert not torch.allclose(after[0], before[0], atol=1e-3)
    assert torch.equal(after[1:], before[1:])
    with Edit.load(tmp_path / "edit.safetensors", base):
        assert torch.equal(_logits(base, *asked), after)
    assert torch.equal(_logits(base, *asked), before)
    data = EVQA(SAMPLES / "vqa_eval.json", train_path=SAMPLES / "vqa_eval.json")
    method = SERAC(base, checkpoint="none", batch_size=2, lr=1e-3)
    method.configure_model()
    examples = data.examples()
    blind = [
        replace(
            e,
            requests=tuple(replace(r, image=None) for r in e.requests),
            probes=tuple(replace(p, image=None) for p in e.probes),
        )
        for e in examples
    ]
    seen, unseen = (
        scope_gradient(base, method.network.scope, some, (0.1, 1.0)).scalars["loss_scope"]
        for some in (examples, blind)
    )
    assert abs(float(seen - unseen)) > 1e-3
    known = {name: value.clone() for name, value in method.network.state_dict().items()}
    fit(method, tmp_path, source=data)
    assert any(not torch.equal(known[n], v) for n, v in method.network.state_dict().items())


def test_the_check_of_long_rows_counts_pictures(base, pictures):
    method, room = FTM(base), base.max_tokens - base.encoder.images.count(pictures[:1])
    word = base.tokenizer.decode(base.tokenizer("this", add_special_tokens=False)["input_ids"][:1])
    prompt = word * (room - 1)
    assert len(base.tokenizer(prompt, add_special_tokens=False)["input_ids"]) < base.max_tokens - 4
    for image, fits in ((None, True), (pictures[0], False)):
        example = EditExample.from_request(EditRequest(prompt, " tower", image=image), "a")
        assert (not method.too_long([example])) == fits


def test_what_reads_no_pictures_says_so(base, pictures):
    fact = EditRequest(QUESTION, " tower", image=pictures[0])
    with pytest.raises(
        UnsupportedUseError, match=r"TPatcher reads text only, and .* choose a method that"
    ):
        TPatcher(base).edit([fact])
    with pytest.raises(UnsupportedUseError, match="model 'nano' of SERAC reads text only"):
        SERAC(base, checkpoint="none", counterfactual="nano").edit([fact])


def test_ranks_agree_as_a_loop_over_positions_counts_them():
    generator = torch.Generator().manual_seed(0)
    base, edited = torch.randn(2, 2, 5, 30, generator=generator, dtype=torch.float64).unbind()
    edited = base + 0.3 * edited
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    for row in range(2):
        pairs = [
            (old.argsort(descending=True)[:10], new.argsort(descending=True)[:10])
            for old, new, kept in zip(base[row], edited[row], mask[row], strict=True)
            if kept
        ]
        expected = sum((old == new).double().mean().item() for old, new in pairs) / len(pairs)
        assert rank_agreement(base, edited, mask, 10)[row].item() == pytest.approx(expected)
        assert 0 < expected < 1


def test_windows_of_an_answer_follow_the_picture(base, pictures):
    requests = [EditRequest(QUESTION, " tower", image=image) for image in (pictures[0], None)]
    seen, blind = (AnswerWindows.of(base, request, 2, False) for request in requests)
    assert seen.row.images == (pictures[0],)
    assert seen.places[0] > blind.places[0]
