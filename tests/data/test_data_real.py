"""The published files, where they are present: each gives all of its records."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kedit_lightning.data import CounterFact, EditDataModule, Requests, Texts, ZsRE
from kedit_lightning.errors import DataFileError

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


@pytest.mark.filterwarnings("ignore:.*white space")
@pytest.mark.parametrize(
    ("name", "group", "bad", "records"),
    [
        ("inverse_relation", "inverse_relation", 5, 385),
        ("subject_replace", "subject_replace", 4, 293),
    ],
)
def test_side_files_of_zsre_hold_subjects_that_their_prompts_lack(
    shared_data: Path, name: str, group: str, bad: int, records: int
) -> None:
    path = shared_data / f"portability/zsre_{name}.json"
    with pytest.raises(DataFileError, match=rf"{bad} bad records of {records}.*'subject'"):
        ZsRE(path=path).examples()
    data = ZsRE(path=path, on_bad_record="skip")
    with pytest.warns(UserWarning, match=f"{bad} of {records}"):
        examples = data.examples()
    assert len(examples) == records - bad == data.source["test"]["records"]
    assert all(example.probes[-1].group == group for example in examples)


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
