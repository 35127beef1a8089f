"""Each dataset's schema: which requests and probes become of a record."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from data_support import complaint, fact, write
from places import SAMPLES

from kedit_lightning.data import CounterFact, NanoFacts, Requests, ZsRE
from kedit_lightning.errors import KEditError
from kedit_lightning.requests import EditExample

DATASETS = {
    "facts.json": Requests,
    "facts_with_probes.jsonl": Requests,
    "zsre.json": ZsRE,
    "counterfact_flat.json": CounterFact,
    "counterfact_nested.json": CounterFact,
    "nano_facts.jsonl": NanoFacts,
}


def probes(example: EditExample) -> list[tuple[str, str, str, tuple[str, ...], str | None]]:
    return [(p.kind, p.group, p.prompt, p.answers, p.contrast) for p in example.probes]


# Requests ------------------------------------------------------------------------------------


def test_own_facts_read_alike_from_json_jsonl_and_csv() -> None:
    json_list, json_lines, table = (
        Requests(path=SAMPLES / f"facts.{kind}").examples() for kind in ("json", "jsonl", "csv")
    )
    assert json_list == json_lines == table
    # The answers that a guess of column types would change.
    assert [e.requests[0].target_new for e in table[2:5]] == ["NA", "007", "2011-05-04"]
    assert table[5].requests[0].subject is None
    assert [e.id for e in table] == ["0", "1", "2", "3", "4", "5"]
    assert probes(table[2]) == [
        ("rewrite", "rewrite", "The country code of Namibia is", ("NA",), "NM"),
        ("rephrase", "rephrase", "Namibia has the country code", ("NA",), "NM"),
    ]


def test_why_records_are_not_read_through_datasets(tmp_path: Path) -> None:
    """When this fails, the reason given in ``records.py`` is out of date."""
    datasets = pytest.importorskip("datasets")
    dates = write(tmp_path / "dates.jsonl", {"target_new": "2011-05-04"})
    (tmp_path / "codes.csv").write_text("target_new\nNA\n007\n")
    settings = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guessed = datasets.load_dataset("json", data_files=str(dates), **settings)
        table = datasets.load_dataset("csv", data_files=str(tmp_path / "codes.csv"), **settings)
    assert guessed["target_new"][0] != "2011-05-04"
    assert list(table["target_new"]) == [None, 7.0]


def test_own_facts_with_all_kinds_of_probes() -> None:
    examples = Requests(path=SAMPLES / "facts_with_probes.jsonl").examples()
    assert probes(examples[0]) == [
        ("rewrite", "rewrite", "Amber Falls lies in", ("Norway",), "Sweden"),
        ("rephrase", "rephrase", "The country of Amber Falls is", ("Norway",), "Sweden"),
        ("locality", "neighborhood", "Birch Lake lies in", ("Sweden",), None),
        (
            "locality",
            "neighborhood",
            "Copper Hill lies in",
            ("Sweden", "the Kingdom of Sweden"),
            None,
        ),
        ("locality", "same_subject", "Amber Falls is fed by the river", (), None),
        (
            "portability",
            "one_hop",
            "The currency used at Amber Falls is the",
            ("krone", "Norwegian krone"),
            None,
        ),
    ]
    # The fourth has no id, and its position is the id of the third.
    assert [e.id for e in examples] == ["falls", "bolt", "3", "record-3", "gull"]
    assert [e.requests[0].id for e in examples] == [e.id for e in examples]


def test_a_single_fact() -> None:
    data = Requests(
        prompt="Amber Falls lies in",
        subject="Amber Falls",
        target_new="Norway",
        target_old="Sweden",
    )
    data.setup("predict")
    (example,) = data.examples()
    assert example.requests[0].subject == "Amber Falls"
    assert probes(example) == [("rewrite", "rewrite", "Amber Falls lies in", ("Norway",), "Sweden")]
    assert data.source["test"]["records"] == 1
    assert data.source["test"]["path"] is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["no file", "--data.path", "prompt"]),
        ({"path": "f.json", "prompt": "A is", "target_new": "b"}, ["both", "f.json", "prompt"]),
        ({"path": "f.json", "subject": "A"}, ["both", "f.json", "subject"]),
        ({"prompt": "A is"}, ["target_new", "--data.target_new"]),
        ({"target_new": "b", "subject": "A"}, ["prompt", "--data.prompt"]),
        ({"prompt": "A is", "target_new": "b", "subject": "C"}, ["subject", "'C'", "'A is'"]),
        ({"prompt": "A is", "target_new": ""}, ["target_new"]),
    ],
)
def test_a_single_fact_that_is_not_one(settings: dict[str, str], words: list[str]) -> None:
    data = Requests(**settings)  # type: ignore[arg-type]
    with pytest.raises(KEditError) as caught:
        data.setup("test")
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


def test_fields_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", fact(rephrase_prompt="x"), fact(note="y", id="b"))
    with pytest.warns(UserWarning, match=r"'rephrase_prompt' \(1 records\), 'note' \(1 records\)"):
        assert len(Requests(path=path).examples()) == 2


def test_csv_of_a_spreadsheet(tmp_path: Path) -> None:
    """Byte-order mark, semicolons, Windows line ends, line breaks in cells, empty rows."""
    path = tmp_path / "f.csv"
    rows = (
        'prompt;target_new;subject\r\n"Amber Falls\r\nlies in";Norway;\r\n;;\r\nBolt is;big;X\r\n'
    )
    path.write_bytes(b"\xef\xbb\xbf" + rows.encode())
    message = complaint(path)
    assert "1 bad record of 2: f.csv line 5: field 'subject' ('X')" in message
    path.write_bytes(path.read_bytes().replace(b";X", b";Bolt"))
    first, second = Requests(path=path).examples()
    assert first.requests[0].prompt == "Amber Falls\r\nlies in"
    assert first.requests[0].subject is None
    assert second.requests[0].subject == "Bolt"


# Published datasets --------------------------------------------------------------------------


def test_zsre() -> None:
    data = ZsRE(path=SAMPLES / "zsre.json")
    with (
        pytest.warns(UserWarning, match=r"edges of target_new \(1\)"),
        pytest.warns(UserWarning, match=r"1 of 6 records .* index 2: field 'alt' is empty"),
    ):
        examples = data.examples()
    assert [e.id for e in examples] == ["0", "1", "3", "4", "5"]
    request = examples[0].requests[0]
    assert (request.target_new, request.target_old) == ("Norway", "Sweden")
    assert request.subject == "Amber Falls"
    assert probes(examples[0])[1:] == [
        ("rephrase", "rephrase", "In what country does Amber Falls lie?", ("Norway",), "Sweden"),
        ("locality", "nq", "nq question: how many moons does the planet mars have", ("two",), None),
        (
            "portability",
            "one_hop",
            "What currency is used at Amber Falls, which lies in Norway?",
            ("Krone",),
            None,
        ),
    ]
    # An answer that is "changed" to itself has nothing to be compared with.
    assert examples[4].requests[0].target_old is None
    assert data.source["test"]["skipped"] == 1
    assert "index 2" in data.source["test"]["skipped_records"][0]


def test_zsre_side_files(tmp_path: Path) -> None:
    record = {"subject": "Amber Falls", "src": "Where is Amber Falls?", "alt": "Norway"}
    path = write(
        tmp_path / "z.json",
        {**record, "inverse question": "What lies in Norway?"},
        {**record, "src": "Amber Falls is where?", "alter_subject_question": "Where is AF?"},
    )
    inverse, alias = ZsRE(path=path).examples()
    assert probes(inverse)[1:] == [
        ("portability", "inverse_relation", "What lies in Norway?", ("Amber Falls",), None)
    ]
    assert probes(alias)[1:] == [
        ("portability", "subject_replace", "Where is AF?", ("Norway",), None)
    ]


def test_counterfact_flat() -> None:
    examples = CounterFact(path=SAMPLES / "counterfact_flat.json").examples()
    assert [e.id for e in examples] == ["0", "10", "20", "30", "40"]
    assert probes(examples[1]) == [
        ("rewrite", "rewrite", "Percy Lund plays the", ("oboe",), "drums"),
        (
            "rephrase",
            "rephrase",
            "It rained all week. Percy Lund performs on the",
            ("oboe",),
            "drums",
        ),
        ("locality", "neighborhood", "Ida Holm plays the", ("drums",), "oboe"),
    ]


def test_counterfact_nested() -> None:
    examples = CounterFact(path=SAMPLES / "counterfact_nested.json").examples()
    request = examples[3].requests[0]
    assert request.prompt == "The newspaper Grey Gull appears in"
    assert (request.subject, request.target_new) == ("Grey Gull", "Lisbon")
    assert (request.target_old, request.id) == ("Porto", "31")
    assert probes(examples[0])[1:] == [
        (
            "rephrase",
            "rephrase",
            "A postcard came. Amber Falls is a place in",
            ("Norway",),
            "Sweden",
        ),
        ("rephrase", "rephrase", "The country of Amber Falls is", ("Norway",), "Sweden"),
        ("locality", "neighborhood", "Birch Lake lies in", ("Sweden",), "Norway"),
        ("locality", "neighborhood", "Copper Hill is found in", ("Sweden",), "Norway"),
        ("portability", "one_hop", "Which currency is used at Amber Falls?", ("Krone",), None),
    ]
    assert probes(examples[1])[-1] == (
        "portability", "subject_replace", "Mr Percy Lund plays the", ("oboe",), None
    )  # fmt: skip
    groups = [(p.group, p.answers, p.contrast) for p in examples[2].probes if p.kind == "locality"]
    assert groups == [
        ("neighborhood", ("stone",), "steel"),
        ("distracting_neighborhood", ("stone",), "steel"),
        ("unrelated_relation", ("the Tarn",), None),
    ]


def test_counterfact_tells_flat_from_nested_record_by_record(tmp_path: Path) -> None:
    flat = json.loads((SAMPLES / "counterfact_flat.json").read_text())
    nested = json.loads((SAMPLES / "counterfact_nested.json").read_text())
    mixed = [record for pair in zip(flat, nested, strict=True) for record in pair]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    examples = CounterFact(path=tmp_path / "mixed.json").examples()
    assert len(examples) == 10
    for one, other in zip(examples[::2], examples[1::2], strict=True):
        assert one.requests[0].prompt == other.requests[0].prompt
        assert one.requests[0].target_old == other.requests[0].target_old


def test_braces_of_a_template_are_text(tmp_path: Path) -> None:
    record = json.loads((SAMPLES / "counterfact_nested.json").read_text())[0]
    record["requested_rewrite"]["prompt"] = "In {x}, {} lies in"
    path = write(tmp_path / "c.json", record)
    assert CounterFact(path=path).examples()[0].requests[0].prompt == "In {x}, Amber Falls lies in"
    record["requested_rewrite"]["prompt"] = "Amber Falls lies in"
    assert "'requested_rewrite.prompt' must hold '{}' once" in complaint(
        write(path, record), CounterFact
    )


def test_nano_facts_sample() -> None:
    examples = NanoFacts(path=SAMPLES / "nano_facts.jsonl").examples()
    assert len(examples) == 5
    assert probes(examples[0])[-2:] == [
        ("locality", "other_relation", "Amber Falls is fed by the", ("Ask",), None),
        ("portability", "one_hop", "The continent of Amber Falls is", ("Europe",), None),
    ]
    assert examples[3].probes[-1].answers == ("Portugal", "Portuguese Republic")


def test_nano_facts_are_packaged_and_share_no_subject() -> None:
    data = NanoFacts()
    subjects = {
        split: {e.requests[0].subject for e in data.examples(split)}
        for split in ("train", "validation", "test")
    }
    assert len(subjects["test"]) >= 500
    assert len(subjects["validation"]) >= 100
    assert not subjects["test"] & (subjects["train"] | subjects["validation"])
    assert not subjects["validation"] & subjects["train"]
    assert data.source["test"]["contradictory_prompts"] == 0


def test_nano_facts_limit_draws_a_fixed_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [e.id for e in NanoFacts().examples()]
    drawn = [e.id for e in NanoFacts(limit=20).examples()]
    assert len(set(drawn)) == 20
    assert drawn != everything[:20]
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")  # which seed_everything sets
    of_run = [e.id for e in NanoFacts(limit=20).examples()]
    assert of_run == [e.id for e in NanoFacts(limit=20, seed=7).examples()] != drawn
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert [e.id for e in NanoFacts(limit=20).examples()] == drawn
    assert [e.id for e in NanoFacts(limit=8).examples()] == drawn[:8]
    assert [e.id for e in NanoFacts(limit=20, seed=1).examples()] != drawn
    # Written out, so that a change of the draw is noticed: published numbers depend on it.
    sample = NanoFacts(path=SAMPLES / "nano_facts.jsonl", limit=3).examples()
    assert [e.id for e in sample] == ["203", "200", "202"]


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "nano_facts.jsonl"])
def test_limit_takes_the_first(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        everything = DATASETS[name](path=SAMPLES / name).examples()
        data = DATASETS[name](path=SAMPLES / name, limit=2)
        assert data.examples() == everything[:2]
    assert data.source["test"]["records"] == 2
