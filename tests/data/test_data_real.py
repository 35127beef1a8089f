"""The published files, where they are present: each gives all of its records."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kedit_lightning.cli.main import main
from kedit_lightning.data import (
    CKnowEdit,
    CounterFact,
    EditDataModule,
    KnowEdit,
    KnownFacts,
    MQuAKE,
    QAEdit,
    Requests,
    SafeEdit,
    Texts,
    ZsRE,
)
from kedit_lightning.data.locality_set import locality_set
from kedit_lightning.data.record_files import read_records
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


#: Of each file, the steps to a field that its records must have.
NEEDED: dict[str, list[str | int]] = {
    "zsre/": ["alt"],
    "counterfact/counterfact-": ["target_new"],
    "counterfact/counterfact_rome": ["requested_rewrite", "target_new", "str"],
    "portability/counterfact": ["requested_rewrite", "subject"],
    "locality/counterfact": ["requested_rewrite", "prompt"],
    "portability/zsre": ["alt"],
    "knowedit/benchmark_WikiBio": ["labels"],
    "knowedit/benchmark_Convsent": ["pos"],
    "knowedit/benchmark_trivia_trivia_qa_test": ["success", 0, "question"],
    "knowedit/benchmark_trivia_trivia_qa_train": ["K_F", 0, "target_new"],
    "knowedit/": ["target_new"],
    "mquake/": ["requested_rewrite", 0, "subject"],
    "qaedit/": ["target"],
    "cknowedit/": ["prompt"],
    "known_1000/": ["attribute"],
}
BROKEN = [(row[0], row[1]) for row in (*FILES, *WHOLE)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dataset", "name"), BROKEN, ids=[name for _, name in BROKEN])
def test_a_broken_copy_of_a_published_file_is_named(
    shared_data: Path, tmp_path: Path, dataset: type[EditDataModule], name: str
) -> None:
    path = shared_data / name
    path = next(iter(sorted(path.glob("*.json")))) if path.is_dir() else path
    copy, steps = tmp_path / path.name, next(v for k, v in NEEDED.items() if name.startswith(k))
    field, whole = str(steps[-1]), isinstance(steps[0], str) and steps[0] in ("success", "K_F")

    def complaint(records: list[object], cut: bool = False) -> str:
        text = json.dumps(records[0] if whole else records, ensure_ascii=False)
        copy.write_text(text[: len(text) // 2] if cut else text, encoding="utf-8")
        settings = {"subset": "convsent"} if "Convsent" in name else {}
        with pytest.raises(DataFileError) as caught:
            dataset(path=copy, **settings).examples()
        return str(caught.value)

    for damage in ("absent", "of another type"):
        records = [record.values for record in read_records(path, 3)[0]]
        place = records[0 if whole else 1]
        for step in steps[:-1]:
            place = place[step]
        if damage == "absent":
            del place[field]
        else:
            place[field] = {"of": [3]}
        message = complaint(records)
        assert re.search(rf"{re.escape(path.name)} (line 1 |index {0 if whole else 1})", message)
        assert f"{field}'" in message, message
    assert re.search(
        rf"{re.escape(path.name)}.*(line \d+|not valid JSON)", complaint(records, True)
    )


#: A file of each dataset that has real ones.
RUN = {
    "zsre": "zsre/zsre_mend_edit.json",
    "counterfact": "counterfact/counterfact-edit.json",
    "counterfact nested": "portability/counterfact_portability_gpt4.json",
    "knowedit zsre": "knowedit/benchmark_ZsRE_ZsRE-test-all.json",
    "knowedit wiki_recent": "knowedit/benchmark_wiki_recent_recent_train.json",
    "knowedit wiki_counterfact": "knowedit/wiki_counterfact_test_cf-generate-10.json",
    "knowedit wikibio": "knowedit/benchmark_WikiBio_wikibio-test-all.json",
    "knowedit convsent": "knowedit/benchmark_Convsent_blender_test.json",
    "knowedit sanitation": "knowedit/benchmark_trivia_trivia_qa_test.json",
    "mquake": "mquake/MQuAKE-hard.json",
    "qaedit": "qaedit/QAEdit_inter_1k.json",
    "cknowedit": "cknowedit/CKnowEditType",
    "known_facts": "known_1000/known_1000.json",
}
#: Scores that datasets bring along.
OWN = {
    "knowedit convsent": {"rewrite/tf_es", "locality/other_topic/kl"},
    "knowedit sanitation": {"rewrite/gen_forgotten"},
    "mquake": {"portability/multi_hop/gen_any", "portability/multi_hop/gen_all"},
    "cknowedit": {"rewrite/gen_char_rougel"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
@pytest.mark.filterwarnings("ignore")
def test_the_command_edits_five_records_of_each(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    config, path = name.partition(" ")[0], shared_data / RUN[name]
    main([
        "test", "-c", "methods/ftm", "-c", f"data/{config}", f"--data.path={path}",
        "--data.limit=5", "--model.steps=2", f"--output={tmp_path / 'run'}",
        f"--model.base_model={shared_data / 'models' / 'stories260K'}",
        "--trainer.protocol.max_new_tokens=4", "--trainer.accelerator=cpu",
        "--data.on_bad_record=skip",
    ])  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    scores = results["scores"]
    assert results["dataset"]["records"] == 5
    assert {"rewrite/tf_tok", "rewrite/gen_em", "rewrite/nll"} <= scores.keys()
    assert OWN.get(name, set()) <= scores.keys()
    lines = (tmp_path / "run" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rewrites = [p for line in lines for p in json.loads(line)["probes"] if p["kind"] == "rewrite"]
    before, after = ([p[state]["log_prob"] for p in rewrites] for state in ("base", "after"))
    assert sum(after) > sum(before)  # fine-tuning makes its answers likelier


@pytest.mark.parametrize(
    ("name", "count"), [("nq_open/NQ-open.dev.jsonl", 3610), ("locality/piqa_valid.jsonl", 1838)]
)
def test_a_published_locality_set(shared_data: Path, name: str, count: int) -> None:
    assert len(locality_set(shared_data / name)) == count


def test_a_published_file_is_not_taken_for_ones_own_facts(shared_data: Path) -> None:
    """Fields in another schema are named, not passed over in silence."""
    data = Requests(path=shared_data / "counterfact/counterfact-val.json", limit=5)
    with pytest.warns(UserWarning, match=r"'rephrase_prompt' \(5 records\)") as caught:
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


@pytest.mark.parametrize(("split", "count"), [("test", 1350), ("val", 2700), ("train", 4050)])
def test_safeedit_where_it_is_there(shared_data: Path, split: str, count: int) -> None:
    found = sorted((shared_data / "safeedit").glob(f"*{split}*.json"))
    if not found:
        pytest.skip(f"the {split} split of SafeEdit is not in {shared_data / 'safeedit'}")
    examples = SafeEdit(path=found[0]).examples()
    assert len(examples) == count
    for example in examples:
        assert example.requests[0].target_old is not None
        assert split != "test" or len(example.probes) == 6
