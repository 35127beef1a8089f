"""What a run has left in its folder, for comparing two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def content(folder: Path) -> dict[str, Any]:
    """Everything a run has written, without time and memory."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    for block in ("timing", "memory"):
        for record in [*lines, results]:
            record.pop(block, None)
    return {
        "lines": lines,
        "results": results,
        "stack": json.loads((folder / "stack.json").read_text()),
        "csv": (folder / "results.csv").read_text(),
        "edits": {p.name: p.read_bytes() for p in (folder / "edits").iterdir()},
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in expected:
        assert found[name] == expected[name], name


def progress(folder: Path) -> int:
    """How many edits and records a run has written."""
    lines = folder / "results.jsonl"
    edits = len(list(folder.glob("edits/*.safetensors")))
    return edits + (lines.read_bytes().count(b"\n") if lines.exists() else 0)
