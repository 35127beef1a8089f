"""The example of a dataset of one's own: what it reads, reports and does as a plug-in."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from data_support import complaint, write
from places import ROOT

from kedit_lightning import EditRequest, Probe
from kedit_lightning.cli.main import main

EXAMPLE = ROOT / "examples" / "dataset.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The example's module, installed as a plug-in beside a file ``quiz.jsonl``."""
    installed = tmp_path / "site" / "quiz-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: quiz\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[kedit_lightning.plugins]\nquiz = dataset\n")
    monkeypatch.syspath_prepend(str(installed.parent))
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("dataset")
    (tmp_path / "quiz.jsonl").write_text(module.SAMPLE)
    yield module
    sys.modules.pop("dataset")


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_its_records_become_requests_and_probes(example: Any) -> None:
    first, second = example.Quiz(path="quiz.jsonl").examples()
    assert first.requests == (EditRequest("Flo aired on", "BBC", id="0"),)
    assert first.probes[1:] == (Probe("rephrase", "Flo was first broadcast on", ("BBC",)),)
    assert second.probes[1:] == (Probe("locality", "Krasnaya Nov is in", ("Russian",)),)


def test_bad_records_are_reported_with_line_and_field(example: Any, tmp_path: Path) -> None:
    good = {"question": "Flo aired on", "answer": "BBC"}
    lines = [good, {**good, "answer": ""}, {"answer": "BBC"}, {**good, "keep": {"Why?": 7}}, "{"]
    said = complaint(write(tmp_path / "bad.jsonl", *lines), example.Quiz)
    for part in (
        "bad.jsonl has 4 bad records of 5",
        "line 2: field 'answer' must be text that is not empty",
        "line 3: field 'question' is missing",
        "line 4: field 'keep.Why?' must be text",
        "line 5: is not valid JSON",
    ):
        assert part in said


def test_the_command_line_tests_on_it_as_a_plug_in(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KEDIT_ALLOW_IMPORTS", raising=False)
    shared = ["test", "-c", "methods/ftm", "--model.base_model=nano", "--data=dataset.Quiz"]
    main([*shared, "--model.steps=2", "--data.path=quiz.jsonl", "--output=run"])
    results = [json.loads(line) for line in Path("run/results.jsonl").read_text().splitlines()]
    assert [record["id"] for record in results] == ["0", "1"]
    Path("quiz.jsonl").write_text('{"question": "Flo aired on"}\n')
    with pytest.raises(SystemExit) as caught:
        main([*shared, "--data.path=quiz.jsonl"])
    assert caught.value.code == 2
