"""Plain text for statistics: what is read, in which order, and what is refused."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from places import SAMPLES

import kedit_lightning.data.text.texts
from kedit_lightning.data import TextBatch, Texts
from kedit_lightning.data.text import hub_stream
from kedit_lightning.errors import DataFileError, KEditError

FOLDER = SAMPLES / "texts"


def all_texts(**settings: Any) -> list[str]:
    return [text for batch in Texts(**settings).train_dataloader() for text in batch.texts]


def test_a_folder_is_read_with_its_subfolders_in_order() -> None:
    data = Texts(path=FOLDER, batch_size=2, max_chars=70)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert all(isinstance(batch, TextBatch) for batch in batches)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert [text for batch in batches for text in batch.texts] == [
        "Snow fell on the pass all night, and the road stayed shut until noon.",
        "A short one.",
        "The harbour was quiet.\n",
        "Boats lay at anchor, and gulls sat on the wall.\n\nA bell rang.\n",
        "The ferry came in at nine.\n",
    ]


def test_nothing_of_a_plain_text_is_lost(tmp_path: Path) -> None:
    words = [f"word{i} " * (i % 13) + "\n" for i in range(60)] + ["x" * 100 + "\n"]
    (tmp_path / "c.txt").write_text("".join(words))
    texts = all_texts(path=tmp_path, max_chars=40)
    assert "".join(texts).split("x" * 40)[0].split() == "".join(words).split("x")[0].split()
    assert sum(text.count("x") for text in texts) == 100
    assert max(map(len, texts)) == 40
    assert any("\n" in text.strip() for text in texts)  # short lines are joined


def test_long_records_are_split_and_limit_counts_texts(tmp_path: Path) -> None:
    rows = [{"body": "abc" * i} for i in range(6)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = {"path": tmp_path / "c.jsonl", "text_column": "body", "max_chars": 7}
    assert all_texts(**settings) == [
        *("abc", "abcabc"),
        *("abcabca", "bc"),
        *("abcabca", "bcabc"),
        *("abcabca", "bcabcab", "c"),
    ]
    assert all_texts(**settings, limit=2) == ["abc", "abcabc"]
    data = Texts(**settings, limit=3, batch_size=2)  # type: ignore[arg-type]
    assert len(data.train_dataloader()) == 2
    assert data.source["records"] == 3


def test_the_source_is_known_by_its_content(tmp_path: Path) -> None:
    sources = []
    for folder, content in [("a", "one\n"), ("b", "one\n"), ("c", "two\n")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.txt").write_text(content)
        sources.append(Texts(path=tmp_path / folder).source)
    assert sources[0]["sha256"] == sources[1]["sha256"] != sources[2]["sha256"]
    assert sources[0]["path"] == str(tmp_path / "a")


def test_text_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch does not wait for the last file."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    data = Texts(path=tmp_path, batch_size=1)
    data.setup()
    (tmp_path / "b.txt").write_bytes(b"\xff")
    batches = iter(data.train_dataloader())
    assert next(batches).texts == ["a\n"]
    with pytest.raises(DataFileError, match=r"b\.txt is not UTF-8"):
        next(batches)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    (tmp_path / "c.jsonl").write_text("".join(f'{{"text": "t{i}"}}\n' for i in range(11)))
    seen, lengths = [], set()
    for rank in range(world_size):
        monkeypatch.setattr(
            kedit_lightning.data.text.texts, "process_rank", lambda rank=rank: (rank, world_size)
        )
        loader = Texts(path=tmp_path, batch_size=2).train_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader)
        lengths.add(len(batches))
        seen += [text for batch in batches for text in batch.texts]
    assert sorted(seen) == sorted(f"t{i}" for i in range(11))
    # unequal numbers would leave a process waiting for the others for ever
    assert lengths == {-(-6 // world_size)}


class Hub:
    """Stands in for ``datasets``: five rows, of which it tells how many were asked for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.asked, self.taken = rows, (), 0

    def load_dataset(self, *names: Any, split: str, streaming: bool) -> Any:
        assert streaming
        self.asked = (*names, split)
        for row in self.rows:
            self.taken += 1
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub([{"text": f"text {i}"} for i in range(3)] + [{"text": " "}, {"text": "x" * 9000}])
    monkeypatch.setattr(hub_stream, "load_dataset", hub.load_dataset)
    return hub


def test_a_dataset_of_the_hub_is_streamed(hub: Hub) -> None:
    data = Texts(hub_name="some/corpus", hub_config="en", split="dev", batch_size=2)
    loader = data.train_dataloader()
    with pytest.raises(TypeError):
        len(loader)
    assert data.source == {"hub": "some/corpus/en/dev", "sha256": None, "records": None}
    batches = iter(loader)
    assert next(batches).texts == ["text 0", "text 1"]
    assert hub.taken == 2
    assert hub.asked == ("some/corpus", "en", "dev")
    assert [len(text) for text in next(batches).texts] == [6, 8192]
    assert [len(text) for text in next(batches).texts] == [9000 - 8192]
    assert next(batches, None) is None
    assert data.source["records"] == 5
    assert len(data.source["sha256"]) == 64
    first = data.source["sha256"]
    list(Texts(hub_name="other", limit=3).train_dataloader())
    list(data.train_dataloader())
    assert data.source["sha256"] == first


def test_a_dataset_of_the_hub_with_a_limit(hub: Hub) -> None:
    assert all_texts(hub_name="some/corpus", limit=1) == ["text 0"]
    assert hub.taken == 1


def test_a_dataset_folder_through_the_real_library(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = "".join(f'{{"text": "t{i}"}}\n' for i in range(5))
    (tmp_path / "train.jsonl").write_text(rows)
    data = Texts(hub_name=str(tmp_path), batch_size=2)
    assert [b.texts for b in islice(data.train_dataloader(), 2)] == [["t0", "t1"], ["t2", "t3"]]


def test_a_hub_that_cannot_be_reached_is_one_sentence() -> None:
    """The test environment is offline."""
    pytest.importorskip("datasets")
    with pytest.raises(DataFileError, match=r"'no/such' cannot be read from the hub: .*; check"):
        next(iter(Texts(hub_name="no/such").train_dataloader()))


def test_a_column_that_is_absent(hub: Hub) -> None:
    with pytest.raises(DataFileError, match=r"no text in column 'body' \(columns: text\)"):
        all_texts(hub_name="some/corpus", text_column="body")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "given neither.*--data.path"),
        ({"path": "a", "hub_name": "b"}, "given both"),
        ({"path": "gone"}, "text 'gone' does not exist"),
        ({"path": FOLDER, "batch_size": 0}, "batch_size of Texts must be at least 1, got 0"),
        ({"path": FOLDER, "limit": 0}, "limit of Texts must be at least 1, got 0"),
        ({"path": FOLDER.parent / "facts.csv"}, "neither a .txt nor a .jsonl"),
        ({"path": FOLDER, "text_column": "body"}, "a.jsonl line 1: field 'body' must be text"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], words: str) -> None:
    data = Texts(**settings)
    with pytest.raises(KEditError, match=words):
        data.setup("fit")


def test_files_that_hold_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"holds no \.txt or \.jsonl"):
        Texts(path=tmp_path).setup()
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(DataFileError, match=r"a\.jsonl line 2 is not valid JSON"):
        Texts(path=tmp_path).setup()
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataFileError, match="holds no text"):
        Texts(path=tmp_path).setup()
