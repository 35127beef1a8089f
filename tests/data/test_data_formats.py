"""Files in other formats of the field are recognised, and the way out is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_support import complaint, write
from places import SAMPLES

from kedit_lightning.data import CounterFact, NanoFacts, Requests, ZsRE
from kedit_lightning.data.field_names import SYNONYMS
from kedit_lightning.data.file_formats import FORMATS, advice, recognised
from kedit_lightning.registry import entries

LEAF = {"prompt": "Rome is in", "ground_truth": [["Italy", "IT"]]}
FACT = {"prompt": "The capital of France is", "subject": "France", "target_new": "Lyon"}
KNOWEDIT = {
    **FACT,
    "ground_truth": ["Paris"],
    "rephrase_prompt": "France's capital is",
    "cond": "x",
    "locality": {"Relation_Specificity": [LEAF]},
    "portability": {"Reasoning": [LEAF]},
}
REWRITE = {
    "prompt": "{} is in", "subject": "Rome", "target_new": {"str": "Chile"},
    "target_true": {"str": "Italy"},
}  # fmt: skip

FOREIGN: list[tuple[str, dict[str, Any], str]] = [
    ("InstructEdit", {"type": "zsre", "prompt": "p", "target_new": "", "metric_kwargs": 1},
     "type is task"),
    ("NQ-open", {"question": "q", "answer": ["a"]}, "question is prompt, answer is target_new"),
    ("PIQA", {"goal": "g", "sol1": "a", "sol2": "b"}, "it states no facts"),
]  # fmt: skip

READ: list[tuple[str, str, dict[str, Any]]] = [
    ("KnowEdit", "KnowEdit", KNOWEDIT),
    ("KnowEdit", "KnowEdit", {**FACT, "portability": {"Subject_Aliasing": [LEAF]}}),
    ("KnowEdit", "KnowEdit", {**FACT, "locality": {"Forgetfulness": [LEAF]}}),
    ("KnowEdit (WikiBio)", "KnowEdit", {"text": "a", "labels": "b", "concept": "c"}),
    ("KnowEdit (ConvSent)", "KnowEdit", {"ent": "a", "pos": ["b"], "neg": ["c"]}),
    ("KnowEdit (Sanitation)", "KnowEdit", {"K_F": [{"question": "a"}], "K_R": []}),
    ("KnowEdit (Sanitation)", "KnowEdit", {"success": [{}], "locality": []}),
    ("MQuAKE", "MQuAKE", {"case_id": 1, "requested_rewrite": [REWRITE], "questions": ["q"],
                          "new_answer": "a"}),
    ("AKEW", "AKEW", {"requested_rewrite": {**REWRITE, "fact_new_uns": "t"}}),
    ("QAEdit", "QAEdit", {"id": 1, "prompt": "p", "target": "a ", "subject": "p", "rephrase": "r",
                          "locality": [{"loc": "q", "loc_ans": "b"}]}),
    ("CKnowEdit", "CKnowEdit", {"prompt": "p", "target_old": "o", "target_new": "n",
                                "rephrase": ["r"], "portability": None}),
    ("WikiBigEdit", "WikiBigEdit", {"subject": "s", "update": "s is", "ans": "a"}),
    ("HalluEditBench", "HalluEditBench",
     {"subject": "s", "relation": "r", "object": "o", "question": "q"}),
    ("UnKE", "UnKE", {"question": "q", "para_question": "r", "answer": "a"}),
    ("SafeEdit", "SafeEdit", {"question": "q", "adversarial prompt": "a", "safe generation": "s"}),
    ("RippleEdits", "RippleEdits", {"example_type": "recent", "edit": {"prompt": "A is B."}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dataset", "record"), READ)
def test_a_format_that_a_dataset_reads(
    tmp_path: Path, name: str, dataset: str, record: dict[str, Any]
) -> None:
    hint = f"it is in the format of {name}, which the dataset {dataset} reads: --data {dataset}"
    assert advice([record] * 3, "Requests").startswith(hint)
    assert advice([record] * 3, dataset) == ""


@pytest.mark.parametrize(("name", "record", "way"), FOREIGN, ids=[f[0] for f in FOREIGN])
def test_a_format_that_no_dataset_reads(
    tmp_path: Path, name: str, record: dict[str, Any], way: str
) -> None:
    message = complaint(write(tmp_path / "f.json", *[record] * 30))
    assert f"(it is in the format of {name}, which no dataset here reads" in message
    assert way in message
    assert message.count("index") + message.count("line") == 3  # each complaint once
    assert len(message) < 900


@pytest.mark.parametrize(
    ("sample", "dataset"),
    [
        ("zsre.json", ZsRE),
        ("counterfact_nested.json", CounterFact),
        ("nano_facts.jsonl", NanoFacts),
    ],
)
def test_a_format_of_another_dataset(sample: str, dataset: type[Any]) -> None:
    name = dataset.__name__
    hint = f"which the dataset {name} reads: --data {name} in place of Requests"
    assert hint in complaint(SAMPLES / sample)


def test_a_format_of_another_dataset_that_can_be_read_in_part() -> None:
    with pytest.warns(UserWarning, match="--data CounterFact in place of Requests") as caught:
        Requests(path=SAMPLES / "counterfact_flat.json").examples()
    assert "'target_old' is what 'ground_truth' says" in str(caught[0].message)


def test_other_readers_name_the_right_one_too() -> None:
    hint = "--data ZsRE in place of CounterFact"
    assert hint in complaint(SAMPLES / "zsre.json", CounterFact)


def test_nothing_is_said_about_files_in_the_format_of_their_reader(tmp_path: Path) -> None:
    assert "format" not in complaint(write(tmp_path / "f.jsonl", {**FACT, "target_new": ""}))
    assert "format" not in complaint(write(tmp_path / "g.jsonl", {"src": "", "alt": "b"}), ZsRE)
    assert recognised([FACT, "text", None, 3, [], {"a": {}}]) is None
    assert advice([{}], "Requests") == ""
    assert advice([KNOWEDIT], "OneOfAnotherPackage") == ""


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        ({"question": "p", "target_new": "a"}, "'prompt' is missing .*was 'question' meant"),
        ({"prompt": "p", "target": "a"}, "'target_new' is missing .*was 'target' meant"),
        ({"prompt": "p", "Target_New": "a"}, "'Target_New' is not known; was 'target_new' meant"),
    ],
)
def test_names_that_nearly_fit(tmp_path: Path, record: dict[str, Any], hint: str) -> None:
    path = write(tmp_path / "f.jsonl", record)
    with pytest.raises(Exception, match=hint):
        Requests(path=path).examples()


def test_formats_name_datasets_and_fields_that_exist() -> None:
    assert {f.dataset for f in FORMATS if f.dataset} <= set(entries("dataset"))
    assert SYNONYMS.keys() <= Requests.known_fields | {"answers"}  # type: ignore[operator]
