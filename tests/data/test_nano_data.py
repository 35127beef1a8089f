"""Properties of the facts, templates and benchmark records that ship for ``nano``."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

import pytest
from places import ROOT

FOLDER = ROOT / "src" / "kedit_lightning" / "data" / "nano_facts"
SPLITS = ("train", "validation", "test")
Record = dict[str, Any]


def _lines(name: str) -> list[Record]:
    return [json.loads(x) for x in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, str]]:
    """subject -> relation -> object."""
    out: dict[str, dict[str, str]] = defaultdict(dict)
    for row in _lines("facts.jsonl"):
        assert row["relation"] not in out[row["subject"]], "one object a subject and relation"
        out[row["subject"]][row["relation"]] = row["object"]
    return dict(out)


@pytest.fixture(scope="module")
def templates() -> dict[str, Record]:
    """The shipped templates."""
    found: dict[str, Record] = json.loads((FOLDER / "templates.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def records() -> dict[str, list[Record]]:
    """split -> records."""
    return {name: _lines(f"{name}.jsonl") for name in SPLITS}


def _subjects(records: list[Record]) -> set[str]:
    return {r["requested_rewrite"]["subject"] for r in records}


def _subject_of(prompt: str, template: str) -> str:
    head, tail = template.split("{}")
    assert prompt.startswith(head), (prompt, template)
    assert prompt.endswith(tail), (prompt, template)
    return prompt[len(head) : len(prompt) - len(tail)]


def test_there_are_enough_facts(facts: dict[str, dict[str, str]]) -> None:
    assert len(facts) >= 1400
    assert len({r for known in facts.values() for r in known}) >= 20
    assert 2 * sum(len(known) >= 2 for known in facts.values()) >= len(facts)


def test_no_object_dominates_its_relation(facts: dict[str, dict[str, str]]) -> None:
    by_relation: dict[str, Counter[str]] = defaultdict(Counter)
    for known in facts.values():
        for relation, obj in known.items():
            by_relation[relation][obj] += 1
    for relation, objects in by_relation.items():
        assert 4 * max(objects.values()) <= objects.total(), relation
        assert len(objects) >= 4, relation


def test_no_answer_can_be_read_off_its_subject(facts: dict[str, dict[str, str]]) -> None:
    for subject, known in facts.items():
        for obj in known.values():
            assert obj.lower() not in subject.lower()
            assert subject.lower() not in obj.lower()


def test_templates_are_valid_and_apart(
    facts: dict[str, dict[str, str]], templates: dict[str, Record]
) -> None:
    wordings: list[str] = []
    for relation in {r for known in facts.values() for r in known}:
        entry = templates[relation]
        assert len(entry["train"]) >= 6, relation
        assert len(entry["held_out"]) == 2, relation
        for template in entry["train"] + entry["held_out"]:
            assert template.count("{}") == 1
            assert template == template.strip()
            assert template[-1] not in ".?!"
        starts = [t.startswith("{}") for t in entry["train"]]
        assert 0 < sum(starts) < len(starts), f"{relation}: subject first and subject later"
        wordings += entry["train"] + entry["held_out"]
    assert len(wordings) == len(set(wordings))


def test_held_out_wordings_differ_in_a_content_word(templates: dict[str, Record]) -> None:
    small = {
        "a",
        "an",
        "and",
        "as",
        "at",
        "by",
        "for",
        "from",
        "has",
        "have",
        "in",
        "is",
        "it",
        "its",
        "of",
        "on",
        "one",
        "or",
        "that",
        "the",
        "to",
        "was",
        "were",
        "whose",
        "with",
        "which",
        "who",
        "{}",
        "{}'s",
    }
    for relation, entry in templates.items():
        trained = {w.strip(",'").lower() for t in entry["train"] for w in t.split()} | small
        for template in entry["held_out"]:
            own = {w.strip(",'").lower() for w in template.split()} - trained
            assert own, f"{relation}: {template}"


def test_every_relation_of_the_templates_has_facts_and_the_reverse(
    facts: dict[str, dict[str, str]], templates: dict[str, Record]
) -> None:
    assert set(templates) == {r for known in facts.values() for r in known}
    assert all(entry["kind"] for entry in templates.values())


def test_splits_are_large_and_disjoint(
    facts: dict[str, dict[str, str]], records: dict[str, list[Record]]
) -> None:
    names = {split: _subjects(rows) for split, rows in records.items()}
    assert len(names["test"]) >= 500
    assert len(names["validation"]) >= 100
    assert all(len(names[s]) == len(records[s]) for s in SPLITS), "one request a subject"
    assert not names["test"] & names["validation"]
    assert not names["train"] & (names["test"] | names["validation"])
    assert names["train"] | names["validation"] | names["test"] == set(facts)
    ids = [r["case_id"] for rows in records.values() for r in rows]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("split", SPLITS)
def test_requests_edit_a_listed_fact(
    split: str,
    facts: dict[str, dict[str, str]],
    templates: dict[str, Record],
    records: dict[str, list[Record]],
) -> None:
    objects: dict[str, set[str]] = defaultdict(set)
    for known in facts.values():
        for relation, obj in known.items():
            objects[relation].add(obj)
    for record in records[split]:
        request = record["requested_rewrite"]
        subject, relation = request["subject"], request["relation_id"]
        old, new = request["target_true"]["str"], request["target_new"]["str"]
        assert facts[subject][relation] == old
        assert new != old
        assert new in objects[relation]
        assert request["prompt"] == templates[relation]["train"][0]
        wanted = [t.format(subject) for t in templates[relation]["held_out"]]
        assert record["paraphrase_prompts"] == wanted
        assert record["attribute_prompts"] == record["generation_prompts"] == []


@pytest.mark.parametrize("split", SPLITS)
def test_probes_ask_about_train_subjects_and_listed_facts(
    split: str,
    facts: dict[str, dict[str, str]],
    templates: dict[str, Record],
    records: dict[str, list[Record]],
) -> None:
    trained = _subjects(records["train"])
    for record in records[split]:
        request = record["requested_rewrite"]
        subject, relation = request["subject"], request["relation_id"]
        assert len(record["neighborhood_prompts"]) <= 5
        for prompt in record["neighborhood_prompts"]:
            other = _subject_of(prompt, request["prompt"])
            assert other in trained
            assert other != subject
            assert facts[other][relation] == request["target_true"]["str"]
        for probe in record["other_relation"]:
            assert subject in probe["prompt"]
            assert any(
                o == probe["answer"]
                and r != relation
                and templates[r]["train"][0].format(subject) == probe["prompt"]
                for r, o in facts[subject].items()
            )
        new = request["target_new"]["str"]
        for probe in record["one_hop"]:
            assert new in trained
            assert subject in probe["prompt"]
            assert set(probe["answers"]) <= set(facts[new].values())


def test_probes_are_there(records: dict[str, list[Record]]) -> None:
    for split in ("validation", "test"):
        assert all(r["neighborhood_prompts"] for r in records[split])
    test = records["test"]
    assert sum(bool(r["other_relation"]) for r in test) >= 200
    assert sum(bool(r["one_hop"]) for r in test) >= 100
