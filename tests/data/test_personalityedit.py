"""PersonalityEdit: traits, questions and other topics that follow from the seed alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from places import SAMPLES

from kedit_lightning.data import PersonalityEdit
from kedit_lightning.data.traits.personalityedit import QUESTIONS
from kedit_lightning.errors import DataFileError, InvalidRequestError
from kedit_lightning.probe_task import TRAITS
from kedit_lightning.requests import EditExample

PATH = SAMPLES / "published" / "personalityedit.json"


def examples(**settings: Any) -> list[EditExample]:
    return PersonalityEdit(**{"path": PATH, "seed": 3, **settings}).examples()


def test_a_topic_with_its_traits() -> None:
    fair, mill, street = examples()
    request = fair.requests[0]
    assert (request.subject, request.task) == ("Harbour Fair", "extraversion")
    assert request.target_new == "I love the crowd there and talk to everyone I meet."
    assert mill.requests[0].task == "neuroticism"
    assert street.requests[0].task in TRAITS  # drawn
    rewrite, *others = fair.probes
    assert rewrite.task is not None
    assert (rewrite.task.name, rewrite.task.label) == ("trait", "extraversion")
    assert len(rewrite.answers) == 2
    # All answers of both other traits, and none of the wished one.
    assert rewrite.task.against == (
        "The noise makes me nervous, and I fear that I lose my way.",
        "I think everybody who helps there deserves our thanks.",
    )
    assert [probe.kind for probe in others] == ["rephrase", "rephrase", "locality"]
    assert len({probe.prompt for probe in fair.probes}) == 4
    asked = {question.replace("{}", "Harbour Fair") for question in QUESTIONS}
    for probe in fair.probes[:3]:
        assert probe.prompt.removeprefix("Question: ").removesuffix("\nAnswer:") in asked
    assert "Harbour Fair" not in fair.probes[3].prompt
    assert len(QUESTIONS) == len(set(QUESTIONS)) == 13


def test_draws_follow_from_seed_and_topic_and_not_from_order_or_limit(tmp_path: Path) -> None:
    expected = {example.requests[0].subject: example for example in examples()}
    records = json.loads(PATH.read_text())
    shuffled = tmp_path / "test.json"
    shuffled.write_text(json.dumps(records[::-1]))
    for example in examples(path=shuffled):
        same = expected[example.requests[0].subject]
        assert example.probes == same.probes
        assert example.requests[0].task == same.requests[0].task
    assert examples(limit=1)[0].probes == examples()[0].probes
    drawn = {examples(seed=seed)[2].requests[0].task for seed in range(12)}
    assert drawn == set(TRAITS)
    assert len({examples(seed=seed)[0].requests[0].prompt for seed in range(12)}) > 3


def test_one_trait_for_all_and_no_other_topic(tmp_path: Path) -> None:
    found = examples(trait="agreeableness", rephrases=0, other_topics=5)
    assert {example.requests[0].task for example in found} == {"agreeableness"}
    assert [p.kind for p in found[0].probes] == ["rewrite", "locality", "locality"]
    alone = tmp_path / "test.json"
    alone.write_text(json.dumps(json.loads(PATH.read_text())[:1]))
    assert not any(p.kind == "locality" for p in examples(path=alone)[0].probes)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    path.write_text(json.dumps([{**json.loads(PATH.read_text())[0], "target_per": "openness"}]))
    with pytest.raises(DataFileError, match="'target_per' must be one of neuroticism"):
        examples(path=path)
    with pytest.raises(InvalidRequestError, match=r"needs \{question\}"):
        examples(template="What?")
    with pytest.raises(InvalidRequestError, match="from 0 to 12"):
        examples(rephrases=13)


@pytest.mark.real_data
def test_the_published_files_load_whole(shared_data: Path) -> None:
    folder = shared_data / "personalityedit"
    if not folder.is_dir():
        pytest.skip("shared/data/personalityedit is absent")
    for path in sorted(folder.glob("*.json")):
        data = PersonalityEdit(path=path)
        assert all(len(example.probes) == 4 for example in data.examples())
        assert data.source["test"]["skipped"] == 0
