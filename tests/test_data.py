"""Each dataset's schema, and what is said about records that do not fit it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import kedit_lightning.data
from kedit_lightning.data import CounterFact, EditDataModule, NanoFacts, Requests, ZsRE
from kedit_lightning.errors import (
    DataFileError,
    DataFileNotFoundError,
    InvalidRequestError,
    KEditError,
    UnsupportedUseError,
)
from kedit_lightning.requests import EditExample

SAMPLES = Path(__file__).parent / "data"
DATASETS = {
    "facts.json": Requests,
    "facts_with_probes.jsonl": Requests,
    "zsre.json": ZsRE,
    "counterfact_flat.json": CounterFact,
    "counterfact_nested.json": CounterFact,
    "nano_facts.jsonl": NanoFacts,
}


def write(path: Path, *records: Any) -> Path:
    """Write records, or raw lines, as JSON Lines."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def fact(**changes: Any) -> dict[str, Any]:
    record = {"prompt": "Amber Falls lies in", "subject": "Amber Falls", "target_new": "Norway"}
    return {key: value for key, value in {**record, **changes}.items() if value != "absent"}


def probes(example: EditExample) -> list[tuple[str, str, str, tuple[str, ...], str | None]]:
    return [(p.kind, p.group, p.prompt, p.answers, p.contrast) for p in example.probes]


def complaint(path: Path, dataset: type[EditDataModule] = Requests) -> str:
    with pytest.raises(DataFileError) as caught:
        dataset(path=path).examples()
    return str(caught.value)


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
    with pytest.warns(UserWarning, match=r"1 of 6 records .* index 2: field 'alt' is empty"):
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
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
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


# What is said about bad records --------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return write(
        tmp_path / "facts.jsonl",
        fact(id="good"),
        fact(id="x", subject="Amber Fall's"),
        "",
        fact(target_new="  "),
        '{"prompt": "unfinished',
        fact(id="late", prompt="absent"),
        fact(id="last", prompt="Amber Falls is in"),
    )


def test_all_bad_records_are_reported_together(broken: Path) -> None:
    message = complaint(broken)
    assert message.startswith("facts.jsonl has 4 bad records of 6: ")
    assert (
        "facts.jsonl line 2 (id 'x'): field 'subject' (\"Amber Fall's\") does not occur" in message
    )
    assert (
        "facts.jsonl line 4: field 'target_new' must be text that is not empty, got '  '" in message
    )
    assert "facts.jsonl line 5: is not valid JSON: " in message
    assert "facts.jsonl line 6 (id 'late'): field 'prompt' is missing (fields here: " in message
    assert "on_bad_record" in message
    assert "\n" not in message


def test_skipped_records_are_counted_and_listed(broken: Path) -> None:
    data = Requests(path=broken, on_bad_record="skip")
    with pytest.warns(UserWarning, match="4 of 6 records of facts.jsonl are left out"):
        assert [e.id for e in data.examples()] == ["good", "last"]
    source = data.source["test"]
    assert (source["records"], source["skipped"]) == (2, 4)
    assert len(source["skipped_records"]) == 4
    assert "line 2 (id 'x'): field 'subject'" in source["skipped_records"][0]
    assert source["sha256"] == hashlib.sha256(broken.read_bytes()).hexdigest()


def test_a_json_list_names_the_index(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([fact(), fact(target_new=1998), "no object"]))
    message = complaint(path)
    assert (
        "facts.json index 1: field 'target_new' must be text that is not empty, got 1998" in message
    )
    assert (
        "facts.json index 2: the record must be an object with fields, got 'no object'" in message
    )


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ({"rephrases": ["a", ""]}, "field 'rephrases[1]' must be text that is not empty, got ''"),
        ({"rephrases": {"a": 1}}, "field 'rephrases' must be a list, got {'a': 1}"),
        ({"locality": [1]}, "field 'locality' must be an object with fields, got [1]"),
        ({"locality": {"nb": [{"answers": ["x"]}]}}, "field 'locality.nb[0].prompt' is missing"),
        ({"locality": {"nb": [{"prompt": "p", "answers": [3]}]}}, "'locality.nb[0].answers[0]'"),
        ({"locality": {"nb": ["p"]}}, "field 'locality.nb[0]' must be an object"),
        ({"portability": {"h": [{"prompt": "p"}]}}, "field 'portability.h[0].answers' must hold"),
        ({"target_old": ""}, "field 'target_old' must be text that is not empty"),
        ({"rephrase": ["x"]}, "field 'rephrase' is not known; was 'rephrases' meant?"),
        ({"sujbect": "x"}, "field 'sujbect' is not known; was 'subject' meant?"),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, change: dict[str, Any], clause: str) -> None:
    message = complaint(write(tmp_path / "f.jsonl", fact(), fact(id="b", **change)))
    assert "1 bad record of 2: f.jsonl line 2 (id 'b'): " in message
    assert clause in message


def test_an_id_used_twice(tmp_path: Path) -> None:
    message = complaint(write(tmp_path / "f.jsonl", fact(id="a"), fact(id=1), fact(id="a")))
    assert "line 3 (id 'a'): field 'id' is the same as in f.jsonl line 1" in message


def test_bad_published_records(tmp_path: Path) -> None:
    record = json.loads((SAMPLES / "zsre.json").read_text())[0]
    path = tmp_path / "z.json"
    path.write_text(json.dumps([{**record, "loc": "how many"}, {**record, "loc_ans": None}]))
    message = complaint(path, ZsRE)
    assert "z.json index 0: field 'loc' must begin with 'nq question: ', got 'how many'" in message
    assert "z.json index 1: field 'loc_ans' is missing" in message
    nested = json.loads((SAMPLES / "counterfact_nested.json").read_text())[0]
    nested["requested_rewrite"]["target_true"] = {"id": "Q1"}
    message = complaint(write(path, nested), CounterFact)
    assert (
        "z.json line 1 (case_id '1'): field 'requested_rewrite.target_true.str' is missing"
        in message
    )


def test_many_bad_records_do_not_fill_the_screen(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", fact(), *[fact(id=str(i), target_new="") for i in range(50)])
    message = complaint(path)
    assert "50 bad records" in message
    assert "and 30 more" in message
    data = Requests(path=path, on_bad_record="skip")
    with pytest.warns(UserWarning, match="50 of 51"):
        data.setup("test")
    assert len(data.source["test"]["skipped_records"]) == 50


def test_contradictory_prompts_are_counted_with_one_warning(tmp_path: Path) -> None:
    path = write(
        tmp_path / "f.jsonl",
        fact(id="a"),
        fact(id="b", target_new="Norway "),  # the same answer
        fact(id="c", target_new="Chile"),
        fact(id="d", target_new="Peru"),
        fact(id="e", prompt="Amber Falls is in"),
    )
    data = Requests(path=path)
    with pytest.warns(UserWarning, match="1 prompt with contradictory targets") as caught:
        assert len(data.examples()) == 5
    assert len(caught) == 1
    assert "'Norway' (record 'a') and 'Chile' (record 'c')" in str(caught[0].message)
    assert data.source["test"]["contradictory_prompts"] == 1


# Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [Requests, ZsRE, CounterFact, NanoFacts])
def test_a_file_that_is_absent(dataset: type[EditDataModule], tmp_path: Path) -> None:
    path = tmp_path / "gone.json"
    data = dataset(path=path, train_path=path)
    with pytest.raises(FileNotFoundError, match=r"gone\.json' does not exist .*--data\.path FILE"):
        data.setup("test")
    with pytest.raises(DataFileNotFoundError, match=r"--data\.train_path FILE"):
        data.setup("fit")


@pytest.mark.parametrize("dataset", [Requests, ZsRE, CounterFact])
def test_no_file_named(dataset: type[EditDataModule]) -> None:
    for stage, option in [("fit", "train_path"), ("validate", "val_path"), ("test", "path")]:
        with pytest.raises(DataFileNotFoundError, match=rf"for .*{stage}.*--data\.{option} FILE"):
            dataset().setup(stage)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("f.json", b"", "holds no records"),
        ("f.json", b"[]", "holds no records"),
        ("f.json", b'[{"prompt": "a"}\n,,]', "not valid JSON: .* at line 2 column 2"),
        ("f.json", b'{"a": "\xff"}', "not UTF-8 text .byte 7."),
        ("f.csv", b'prompt,target_new\na,"b\n', "f.csv line 2 is not valid CSV"),
        ("f.csv", b"prompt,target_new\na,b,c\n", "f.csv line 2: has 3 cells under 2 columns"),
        ("f.csv", b"prompt,target_new\n", "holds no records"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError, match=words):
        Requests(path=tmp_path / name).setup("test")
    with pytest.raises(DataFileError, match="is a folder"):
        Requests(path=tmp_path).setup("test")


def test_nothing_usable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", fact(target_new=""))
    with pytest.raises(DataFileError, match=r"no usable record: f\.jsonl line 1"):
        Requests(path=path, on_bad_record="skip").examples()


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", fact())
    assert Requests(path=path).examples()[0].requests[0].target_new == "Norway"
    write(path, fact(target_new="Chile!"))
    assert Requests(path=path).examples()[0].requests[0].target_new == "Chile!"


def test_constructors_touch_no_file_and_setup_reads_once(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    data = Requests(path=path, train_path=path)
    write(path, fact())
    data.setup("test")
    write(path, fact(target_new="Chile"))
    data.setup("test")
    data.setup("predict")
    assert data.examples()[0].requests[0].target_new == "Norway"
    assert list(data.source) == ["test"]
    data.setup("fit")
    assert data.examples("train")[0].requests[0].target_new == "Chile"


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UnsupportedUseError, match="limit must be at least 1, got 0"):
        Requests(path=SAMPLES / "facts.json", limit=0).setup("test")
    with pytest.raises(UnsupportedUseError, match="no split 'dev'; it is one of train"):
        Requests(path=SAMPLES / "facts.json").examples("dev")  # type: ignore[arg-type]


def test_an_error_of_a_dataset_of_ones_own_is_reported_too(tmp_path: Path) -> None:
    class Own(EditDataModule):
        def parse(self, fields: Any, id: str) -> EditExample:
            raise InvalidRequestError("field 'a' is odd")

    assert "f.jsonl line 1: field 'a' is odd" in complaint(write(tmp_path / "f.jsonl", {}), Own)


def test_the_package_is_imported_lazily() -> None:
    code = (
        "import sys, kedit_lightning.data as d; assert 'lightning' not in sys.modules; "
        "assert set(d.__all__) <= set(dir(d)); d.TextBatch; assert 'lightning' in sys.modules; "
        "assert 'datasets' not in sys.modules "
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    for name in kedit_lightning.data.__all__:
        assert getattr(kedit_lightning.data, name) is not None
    with pytest.raises(AttributeError, match="Missing"):
        kedit_lightning.data.Missing  # noqa: B018
