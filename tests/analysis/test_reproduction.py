"""``kedit reproduce``: equal numbers, rounding, and what differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from kedit_lightning.analysis.reproduction import reproduction
from kedit_lightning.cli.main import main
from kedit_lightning.errors import DataFileError, DataFileNotFoundError
from kedit_lightning.runs.record_lines import line_of
from kedit_lightning.runs.results import FORMAT, read_results

READING = {"tf_all": True, "log_prob": -0.5, "text": " Rome.", "top1": [3, 4]}
RECORD: dict[str, Any] = {
    "id": "a",
    "stage": "immediate",
    "edit_id": "0f",
    "probes": [{"kind": "rewrite", "group": "rewrite", "prompt": "p", "after": READING}],
    "timing": {"edit_seconds": 1.0},
}
RESULTS = {
    "format": FORMAT,
    "scores": {"rewrite/tf_all": {"mean": 1.0}},
    "versions": {"torch": "2.13.0"},
    "timing": {"edit_seconds": {"mean": 1.0}},
}


def run(folder: Path, records: list[dict[str, Any]], **results: Any) -> Path:
    folder.mkdir()
    lines = [line_of(record) for record in records]  # type: ignore[arg-type]
    (folder / "results.jsonl").write_bytes(b"".join(lines))
    (folder / "results.json").write_text(json.dumps({**RESULTS, **results}))
    return folder


def changed(**reading: Any) -> dict[str, Any]:
    record = copy.deepcopy(RECORD)
    record["probes"][0]["after"].update(reading)
    return record


def test_runs_that_differ_in_costs_alone_are_equal(tmp_path):
    slower = {**RECORD, "timing": {"edit_seconds": 2.0}}
    first = run(tmp_path / "a", [RECORD])
    second = run(tmp_path / "b", [slower], timing={"edit_seconds": {"mean": 2.0}})
    found = reproduction(first, second)
    assert found.equal
    assert not found.rounded
    assert not found.facts
    assert found.readings == 11  # 3 of the record, 3 of the probe, 5 of its reading


def test_rounding_is_told_apart_from_another_answer(tmp_path):
    first = run(tmp_path / "a", [RECORD])
    rounded = run(tmp_path / "b", [{**changed(log_prob=-0.5000001), "edit_id": "1f"}])
    assert not reproduction(first, rounded).equal
    near = reproduction(first, rounded, tolerance=1e-5)
    assert near.equal
    assert near.rounded == 2
    assert near.largest[""] == pytest.approx(1e-7)


@pytest.mark.parametrize(
    ("reading", "name"),
    [
        ({"log_prob": -0.6}, "probes/after/log_prob"),
        ({"text": " Rome!"}, "probes/after/text"),
        ({"tf_all": False}, "probes/after/tf_all"),
        ({"top1": [3, 5]}, "probes/after/top1"),
        ({"top1": [3]}, "probes/after/top1"),
        ({"log_prob": None}, "probes/after/log_prob"),
    ],
)
def test_another_reading_is_named(tmp_path, reading, name):
    first, second = run(tmp_path / "a", [RECORD]), run(tmp_path / "b", [changed(**reading)])
    found = reproduction(first, second, tolerance=1e-5)
    assert not found.equal
    assert dict(found.differing) == {name: 1}


def test_missing_records_scores_and_facts_are_named(tmp_path):
    first = run(tmp_path / "a", [RECORD, {**RECORD, "id": "b"}])
    other = {"scores": {"rewrite/tf_all": {"mean": 0.5}}, "versions": {"torch": "2.14.0"}}
    found = reproduction(first, run(tmp_path / "b", [RECORD], **other), tolerance=1e-5)
    assert found.missing == ("b (immediate)",)
    assert found.scores == (("rewrite/tf_all", 1.0, 0.5),)
    assert found.facts == ("versions.torch: '2.13.0' -> '2.14.0'",)


def test_results_of_a_newer_format_and_no_results_are_refused(tmp_path):
    newer = run(tmp_path / "a", [RECORD], format=FORMAT + 1)
    with pytest.raises(DataFileError, match=f"has format {FORMAT + 1}, .* up to {FORMAT}; update"):
        read_results(newer)
    with pytest.raises(DataFileNotFoundError, match="not the folder of a finished run"):
        read_results(tmp_path)


@pytest.mark.slow
def test_the_command_repeats_a_run(tmp_path, capsys):
    fact = {"prompt": "The capital of France is", "target_new": "Rome", "subject": "France"}
    facts, output = tmp_path / "facts.json", tmp_path / "run"
    facts.write_text(json.dumps([fact]))
    words = ["test", "-c", "methods/ftm", "--model.base_model", "nano", "--data", "Requests"]
    main([*words, "--data.path", str(facts), "--model.steps", "2", "--output", str(output)])
    results = read_results(output)
    assert results["format"] == FORMAT
    assert results["environment"]["device"] == "cpu"
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", str(output), "--tolerance", "0"])
    assert ended.value.code == 0
    assert f"run-reproduced equals {output}: " in capsys.readouterr().out

    fact["target_new"] = "Madrid"
    facts.write_text(json.dumps([fact]))
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", str(output), "--output", str(tmp_path / "other")])
    assert ended.value.code == 3
    told = capsys.readouterr().err
    assert "other differs from" in told
    assert "what may explain it: dataset.sha256" in told
