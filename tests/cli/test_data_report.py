"""``kedit data``: what a file holds, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import ROOT

from kedit_lightning.cli.main import main

SAMPLES = ROOT / "tests" / "samples"


def report(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["data", *words])
    assert ended.value.code == 0
    return capsys.readouterr().out


def refusal(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["data", *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_file_is_recognised_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    path = SAMPLES / "published" / "knowedit_zsre.json"
    text = report(str(path), capsys=capsys)
    assert "2 examples, as KnowEdit reads them" in text
    assert "facts without a subject: 1" in text
    assert "name a subject that the prompt has in other words" in text
    assert "Relation_Specificity" in text


def test_duplicates_conflicts_and_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = [
        {"prompt": "Hask lies in", "target_new": "Veldt"},
        {"prompt": "hask lies in ", "target_new": "Veldt"},
        {"prompt": "Hask lies in", "target_new": "Marland"},
        {"prompt": "word " * 400, "target_new": "end"},
        {"prompt": "", "target_new": "x"},
    ]
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(facts))
    text = report("Requests", str(path), "--model", "nano", capsys=capsys)
    assert "4 examples, as Requests reads them" in text
    assert "records left out: 1" in text
    assert "duplicates (same prompt and answer): 1" in text
    assert "conflicts (same prompt, other answer): 1" in text
    assert "'Veldt'" in text  # named in a note
    assert "'Marland'" in text
    assert "too long: record 3:" in text
    assert "takes at most" in text


def test_what_cannot_be_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refusal(str(tmp_path / "no.json"), capsys=capsys)
    assert "there is no dataset 'ZsRe'" in refusal("ZsRe", "f.json", capsys=capsys)
    assert "usage: kedit data" in refusal(capsys=capsys)
    assert "too many words" in refusal("A", "B", "C", capsys=capsys)
    path = str(SAMPLES / "facts.json")
    assert "could not be loaded" in refusal(path, "--model", str(tmp_path), capsys=capsys)
