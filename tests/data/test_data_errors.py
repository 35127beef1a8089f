"""What is said about records that do not fit, and about files that cannot be read."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_support import complaint, fact, write
from places import SAMPLES

import kedit_lightning.data
from kedit_lightning.data import CounterFact, EditDataModule, NanoFacts, Requests, ZsRE
from kedit_lightning.errors import (
    DataFileError,
    DataFileNotFoundError,
    InvalidRequestError,
    UnsupportedUseError,
)
from kedit_lightning.requests import EditExample

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
    places = "f.jsonl line 2 (id '0'), line 3 (id '1'), line 4 (id '2') and 47 more: field"
    assert places in message
    assert message.count("must be text that is not empty") == 1
    different = complaint(write(path, *[fact(id=str(i), rephrases=[i]) for i in range(50)]))
    assert "; and 30 more; correct them" in different
    write(path, fact(), *[fact(id=str(i), target_new="") for i in range(50)])
    data = Requests(path=path, on_bad_record="skip")
    with pytest.warns(UserWarning, match="50 of 51"):
        data.setup("test")
    assert len(data.source["test"]["skipped_records"]) == 50


def test_contradictory_prompts_are_counted_with_one_warning(tmp_path: Path) -> None:
    path = write(
        tmp_path / "f.jsonl",
        fact(id="a"),
        fact(id="b", target_new="NORWAY"),  # the same answer
        fact(id="c", target_new="Chile"),
        fact(id="d", target_new="Chile"),
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
        ("f.json", '{"a": "b"}'.encode("utf-16"), "not UTF-8 text but UTF-16"),
        ("f.json", b"[" * 100000, "f.json is not valid JSON: maximum recursion depth"),
        ("f.json", b"[" + b"9" * 5000 + b"]", "f.json is not valid JSON: Exceeds the limit"),
        ("f.jsonl", b"{}\n" + b"9" * 5000, "f.jsonl line 2: is not valid JSON: Exceeds"),
        ("f.csv", b'prompt,target_new\na,"b\n', "f.csv line 2 is not valid CSV"),
        ("f.csv", b"prompt,target_new\na,b,c\n", "f.csv line 2: has 3 cells under 2 columns"),
        ("f.csv", b"prompt,target_new\n", "holds no records"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError, match=words):
        Requests(path=tmp_path / name).setup("test")


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
