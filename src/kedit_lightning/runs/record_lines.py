"""Lines of ``results.jsonl``: a record each, with a hash by which damage is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from kedit_lightning.errors import ResumeError
from kedit_lightning.metrics import ExampleRecord

#: Blocks that differ between two runs of the same settings; what is left does not.
COSTS = ("timing", "memory")
_DIGEST = "digest"


def line_of(record: ExampleRecord) -> bytes:
    """The line of a record."""
    values = json.loads(json.dumps(record))
    values[_DIGEST] = _digest(values)
    return (json.dumps(values, ensure_ascii=False) + "\n").encode("utf-8")


def records_in(folder: Path) -> Iterator[ExampleRecord]:
    """The records of a finished run.

    Raises:
        ResumeError: A line is damaged; the message has its number.
    """
    path = folder / "results.jsonl"
    return read_lines(path, path.read_bytes())


def read_lines(path: Path, content: bytes) -> Iterator[ExampleRecord]:
    """The records of complete lines.

    Raises:
        ResumeError: A line is damaged; the message has its number.
    """
    lines = content.split(b"\n")[:-1]
    # Lines of earlier releases have no hash.
    hashed = any(f'"{_DIGEST}": "'.encode() in line for line in lines)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
            digest = record.pop(_DIGEST, None)
            whole = digest == _digest(record) if hashed else _is_record(record)
        except (ValueError, AttributeError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise ResumeError(
                f"line {number} of {path} is damaged, so the run cannot be continued; remove that "
                "line to have its example scored again, or start a new run in another folder"
            )
        yield cast(ExampleRecord, record)


def _digest(record: Mapping[str, Any]) -> str:
    values = {name: value for name, value in record.items() if name not in (*COSTS, _DIGEST)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _is_record(record: Mapping[str, Any]) -> bool:
    texts = [record.get(name) for name in ("id", "stage", "edit_name", "edit_id") if name in record]
    probes = record.get("probes")
    needed = {"kind", "group", "prompt", "answers", "base", "before", "after"}
    return (
        {"id", "stage"} <= record.keys()
        and all(isinstance(text, str) for text in texts)
        and ("edit_name" in record) == ("edit_id" in record)
        and isinstance(probes, list)
        and all(isinstance(probe, dict) and needed <= probe.keys() for probe in probes)
    )
