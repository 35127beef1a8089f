"""The published files, where they are present: each gives all of its records."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kedit_lightning.data import (
    CKnowEdit,
    CounterFact,
    EditDataModule,
    KnowEdit,
    KnownFacts,
    MQuAKE,
    QAEdit,
    Requests,
    Texts,
    ZsRE,
)
from kedit_lightning.data.locality_set import locality_set

pytestmark = pytest.mark.real_data

FLAT = {"rephrase": 1, "neighborhood": 1}
NESTED = {"rephrase": 2, "neighborhood": 10}
DISTRACTING = {"distracting_neighborhood": 10, "unrelated_relation": 1, "one_hop": 1}
FILES = [
    (ZsRE, "zsre/zsre_mend_edit.json", 1037, 3, {"rephrase": 1, "nq": 1, "one_hop": 1}),
    (ZsRE, "zsre/zsre_3k.json", 3000, 4, {"rephrase": 1, "nq": 1}),
    (CounterFact, "counterfact/counterfact-edit.json", 10000, 62, FLAT),
    (CounterFact, "counterfact/counterfact-train.json", 10000, 59, FLAT),
    (CounterFact, "counterfact/counterfact-val.json", 1919, 5, FLAT),
    (CounterFact, "counterfact/counterfact_rome_format_1031.json", 1031, 0, NESTED),
    (
        CounterFact,
        "portability/counterfact_portability_gpt4.json",
        1031,
        0,
        {**NESTED, "one_hop": 1},
    ),
    (
        CounterFact,
        "portability/counterfact_subject_replace.json",
        213,
        0,
        {**NESTED, "subject_replace": 1},
    ),
    (
        CounterFact,
        "locality/counterfact_distracting_neighbor.json",
        804,
        0,
        {**NESTED, **DISTRACTING},
    ),
]


@pytest.mark.parametrize(
    ("dataset", "name", "records", "contradictions", "probes"), FILES, ids=[f[1] for f in FILES]
)
def test_a_published_file(
    shared_data: Path,
    dataset: type[EditDataModule],
    name: str,
    records: int,
    contradictions: int,
    probes: dict[str, int],
) -> None:
    data = dataset(path=shared_data / name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        examples = data.examples()
    said = [str(warning.message) for warning in caught]
    assert sum("contradictory" in text for text in said) == bool(contradictions)
    assert all("contradictory" in text or "white space" in text for text in said)
    source = data.source["test"]
    assert (len(examples), source["skipped"]) == (records, 0)
    assert source["contradictory_prompts"] == contradictions
    assert len({example.id for example in examples}) == records
    found = Counter(probe.group for example in examples for probe in example.probes)
    assert found == {
        "rewrite": records, **{group: records * count for group, count in probes.items()}
    }  # fmt: skip
    for example in examples:
        request = example.requests[0]
        assert request.subject is not None
        assert request.target_new == request.target_new.strip()
        assert request.target_old != request.target_new


def test_flat_and_nested_counterfact_agree(shared_data: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = {
            example.id: example.requests[0]
            for part in ("edit", "train", "val")
            for example in CounterFact(
                path=shared_data / f"counterfact/counterfact-{part}.json"
            ).examples()
        }
    nested = CounterFact(path=shared_data / "counterfact/counterfact_rome_format_1031.json")
    shared = [example for example in nested.examples() if example.id in flat]
    assert len(shared) > 1000
    # Flat records do not say which relation they are of.
    assert all(flat[e.id] == replace(e.requests[0], task=None) for e in shared)
    assert all(e.requests[0].task for e in shared)


#: Dataset, file, records, records whose prompt lacks their subject, and probes by group.
WHOLE: list[tuple[type[EditDataModule], str, int, int, dict[str, int]]] = [
    (ZsRE, "portability/zsre_inverse_relation.json", 385, 5,
     {"rephrase": 385, "inverse_relation": 385}),
    (ZsRE, "portability/zsre_subject_replace.json", 293, 4,
     {"rephrase": 293, "subject_replace": 293}),
    (ZsRE, "knowedit/benchmark_ZsRE_ZsRE-test-all.json", 1304, 3,
     {"rephrase": 1304, "Relation_Specificity": 2608, "Reasoning": 771, "Subject_Aliasing": 264,
      "Logical_Generalization": 269}),
    (KnowEdit, "knowedit/ZsRE-test-all-prompt10.json", 1304, 3,
     {"rephrase": 14399, "Relation_Specificity": 2608, "Reasoning": 771, "Subject_Aliasing": 264,
      "Logical_Generalization": 269}),
    (KnowEdit, "knowedit/wiki_counterfact_test_cf-generate-10.json", 885, 0,
     {"rephrase": 8876, "Relation_Specificity": 5488, "Forgetfulness": 468, "Reasoning": 2221,
      "Subject_Aliasing": 2408, "Logical_Generalization": 463}),
    (KnowEdit, "knowedit/benchmark_wiki_counterfact_train_cf.json", 1428, 0,
     {"Relation_Specificity": 1254, "Forgetfulness": 782, "Reasoning": 504,
      "Subject_Aliasing": 1410, "Logical_Generalization": 305}),
    (KnowEdit, "knowedit/benchmark_wiki_recent_recent_train.json", 570, 0,
     {"Relation_Specificity": 1648, "Forgetfulness": 298, "Reasoning": 476,
      "Subject_Aliasing": 52, "Logical_Generalization": 223}),
    (KnowEdit, "knowedit/benchmark_WikiBio_wikibio-train-all.json", 464, 0,
     {"Relation_Specificity": 928}),
    (KnowEdit, "knowedit/benchmark_WikiBio_wikibio-test-all.json", 306, 0,
     {"Relation_Specificity": 612}),
    (KnowEdit, "knowedit/benchmark_Convsent_blender_val.json", 799, 0,
     {"rephrase": 1598, "other_topic": 799}),
    (KnowEdit, "knowedit/benchmark_Convsent_blender_test.json", 800, 0,
     {"rephrase": 1600, "other_topic": 800}),
    (KnowEdit, "knowedit/benchmark_trivia_trivia_qa_train.json", 80, 0, {"retained": 453}),
    (KnowEdit, "knowedit/benchmark_trivia_trivia_qa_test.json", 80, 0, {"retained": 453}),
    (MQuAKE, "mquake/MQuAKE-hard.json", 429, 0,
     {"rephrase": 1716, "multi_hop": 1287, "single_hop": 1716}),
    (QAEdit, "qaedit/QAEdit_inter_1k.json", 1000, 0, {"rephrase": 1000, "qa": 5000}),
    (CKnowEdit, "cknowedit/CKnowEditType", 700, 0,
     {"rephrase": 1832, "portability": 1433, "locality": 567}),
    (KnownFacts, "known_1000/known_1000.json", 1209, 0, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dataset", "name", "records", "lost", "probes"), WHOLE, ids=[row[1] for row in WHOLE]
)
def test_a_published_file_loads_whole(
    shared_data: Path,
    dataset: type[EditDataModule],
    name: str,
    records: int,
    lost: int,
    probes: dict[str, int],
) -> None:
    data = dataset(path=shared_data / name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        examples = data.examples()
    said = [str(one.message) for one in caught]
    assert sum(f"{lost} record" in text and "other words" in text for text in said) == bool(lost)
    assert (len(examples), data.source["test"]["skipped"]) == (records, 0)
    requests = sum(len(example.requests) for example in examples)
    found = Counter(probe.group for example in examples for probe in example.probes)
    assert found == {"rewrite": requests, **probes}
    assert sum(example.requests[0].subject is None for example in examples) >= lost


@pytest.mark.parametrize(
    ("name", "count"), [("nq_open/NQ-open.dev.jsonl", 3610), ("locality/piqa_valid.jsonl", 1838)]
)
def test_a_published_locality_set(shared_data: Path, name: str, count: int) -> None:
    assert len(locality_set(shared_data / name)) == count


def test_a_published_file_is_not_taken_for_ones_own_facts(shared_data: Path) -> None:
    """Fields in another schema are named, not passed over in silence."""
    data = Requests(path=shared_data / "counterfact/counterfact-val.json", limit=5)
    with pytest.warns(UserWarning, match=r"'rephrase_prompt' \(1919 records\)") as caught:
        data.setup("test")
    assert "'ground_truth'" in str(caught[0].message)


def test_plain_text(shared_data: Path) -> None:
    data = Texts(path=shared_data / "wikitext-2", max_chars=2000, batch_size=16)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader)
    characters = sum(len(text) for batch in batches for text in batch.texts)
    size = sum(
        len((shared_data / "wikitext-2" / name).read_text(encoding="utf-8"))
        for name in ("test.txt", "valid.txt")
    )
    assert 0.99 * size < characters <= size
