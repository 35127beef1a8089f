"""Files of records are read piece by piece, and say what parsing the whole would say."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from data_support import fact, write

from kedit_lightning.data import KnowEdit, Requests, record_files
from kedit_lightning.data.record_files import read_records
from kedit_lightning.errors import DataFileError

VALUES: list[Any] = [
    {}, [], 12, -3.5e-7, True, None, "", "a,]}\\\"[{", {"a": [1, {"b": "]"}]}, "\u4e2d\u2028\u00e9",
    {"prompt": "x" * 40}, 120034, [[[]], ","],
]  # fmt: skip


def said(path: Path, most: int | None = None) -> Any:
    try:
        return [(r.where, r.values, r.problem) for r in read_records(path, most)[0]]
    except DataFileError as error:
        return str(error)


def damaged(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text))
    return rng.choice([
        text, text[:place], text[:place] + rng.choice(",[]{}\"1 x\\") + text[place:],
        text[:place] + text[place + 1:], text + rng.choice([" \n", "x", "]", "\n[1]"]),
    ])  # fmt: skip


def test_pieces_of_any_size_give_what_the_whole_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, path, wrong = random.Random(0), tmp_path / "f.json", 0
    for case in range(200):
        values = rng.choices(VALUES, k=rng.randint(0, 5))
        text = json.dumps(values, ensure_ascii=case % 2 == 0, indent=rng.choice([None, 1]))
        text = rng.choice(["", "\n ", "\ufeff"]) + damaged(text, rng)
        path.write_text(text, encoding="utf-8")
        try:
            whole = json.loads(text.removeprefix("\ufeff"))
        except ValueError:
            whole = None
        monkeypatch.setattr(record_files, "_CHUNK", 1 << 20)
        expected = said(path)
        monkeypatch.setattr(record_files, "_CHUNK", rng.randint(1, 7))
        assert said(path) == expected, text
        if isinstance(whole, list) and whole:
            assert [value for _, value, _ in expected] == whole
            for most in (1, len(whole)):
                assert said(path, most) == expected[:most]
        elif text.strip("\ufeff \n").startswith("["):
            assert isinstance(expected, str)
            assert "not valid JSON" in expected or "no records" in expected
            wrong += 1
    assert wrong > 50


@pytest.mark.parametrize("lines", [True, False])
def test_a_limit_reads_no_further_and_takes_no_more_memory(tmp_path: Path, lines: bool) -> None:
    path = tmp_path / ("f.jsonl" if lines else "f.json")
    line = json.dumps(fact(rephrases=["x" * 1000])).encode()
    with path.open("wb") as file:
        file.write(b"" if lines else b"[")
        for _ in range(8_000):  # 8 MB
            file.write(line + (b"\n" if lines else b","))
        file.write(b"{ no end")
    data = Requests(path=path, limit=100)
    tracemalloc.start()
    try:
        examples = data.examples()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(examples) == 100
    assert peak < 4 << 20
    assert data.source["test"]["sha256"] == read_records(path, 1)[1]
    with pytest.raises(DataFileError, match="line 8001" if lines else "not valid JSON"):
        Requests(path=path).examples()


def test_a_limit_counts_records_that_can_be_used(tmp_path: Path) -> None:
    records = [fact(id=str(i), target_new="" if i % 3 else "Norway") for i in range(30)]
    path = write(tmp_path / "f.jsonl", *records)
    data = Requests(path=path, limit=4, on_bad_record="skip")
    with pytest.warns(UserWarning, match="left out"):
        assert [e.id for e in data.examples()] == ["0", "3", "6", "9"]
    with pytest.raises(DataFileError, match="2 bad records of 4"):
        Requests(path=path, limit=4).examples()
    assert [e.id for e in Requests(path=path, limit=1).examples()] == ["0"]


def test_a_limit_of_records_inside_of_one(tmp_path: Path) -> None:
    asked = [
        {"question": f"What is {i}?", "ground_truth": "A", "target_new": "B"} for i in range(9)
    ]
    path = tmp_path / "sanitation.json"
    path.write_text(json.dumps({"success": asked, "locality": []}))
    assert len(KnowEdit(path=path, limit=5).examples()) == 5


def test_a_table_and_a_folder_are_read_no_further(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text('prompt,target_new\nThe sky is,blue\n"Grass, too, is",green\nunfinished,"\n')
    assert [r.where for r in read_records(table, 2)[0]] == ["a.csv line 2", "a.csv line 3"]
    with pytest.raises(DataFileError, match="not valid CSV"):
        read_records(table)
    write(tmp_path / "b.jsonl", *[fact(id=str(i)) for i in range(3)])
    examples = Requests(path=tmp_path, limit=2).examples()
    assert [e.requests[0].target_new for e in examples] == ["blue", "green"]
