"""Whether a run may be continued: its settings, and the records that it has scored."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kedit_lightning.contradictions import consistent, remaining
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.edits.edit_file import read_edit
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.errors import ResumeError
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.requests import EditExample, EditRequest

#: What a file of data may have more or less of while its scored records are the same.
_OF_DATA = ("dataset.sha256", "dataset.records")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a run was started with.

    Raises:
        ResumeError: The file is damaged.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(settings["protocol"]["mode"] + settings["dataset"]["name"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ResumeError(
            f"{path} is damaged ({str(error) or repr(error)}), so it cannot be told which run it "
            "is of; put back a copy of it, or start a new run in another folder"
        ) from error
    found: dict[str, Any] = settings
    return found


def differences(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """What differs between two nested settings: its name, and a clause."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            inner = f"{name}.{key}" if name else key
            yield from differences(then.get(key), now.get(key), inner)
    elif then != now:
        yield name, f"{name}: {then!r} -> {now!r}"


def setting_changes(
    then: Mapping[str, Any], now: Mapping[str, Any], data_may_differ: bool
) -> list[str]:
    """Clauses about settings that differ, other than the number of records where it may."""
    of_data = set(_OF_DATA) if data_may_differ else set()
    if data_may_differ and all(map(_written_at_once, (then, now))):
        of_data.add("protocol.chunk_size")
    found = differences(dict(then), dict(now))
    return [clause for name, clause in found if name not in of_data]


def _written_at_once(settings: Mapping[str, Any]) -> bool:
    """Whether one edit writes all records of a run, so that its chunks follow their number."""
    protocol, records = settings["protocol"], settings["dataset"].get("records")
    return bool(protocol["mode"] == "batch" and protocol.get("chunk_size") == records)


def scored_changes(
    records: Iterable[ExampleRecord],
    examples: Sequence[EditExample],
    protocol: Mapping[str, Any],
    edits: Path,
    left_out: Collection[tuple[str, int]] = frozenset(),
) -> Iterator[str]:
    """Clauses about scored records that are not those of the data any more.

    Args:
        records: The records that a run has scored.
        examples: The examples of the data now.
        protocol: Its facts.
        edits: The folder of the saved edits.
        left_out: Requests that the run does not write, see :class:`RunContext`.
    """
    by_id = {example.id: example for example in examples}
    checked, final = set[str](), set[str]()
    for record in records:
        id, name = record["id"], str(record.get("edit_name", ""))
        example = by_id.get(id)
        final |= {id} if record["stage"] == "final" else set()
        if example is None:
            yield f"record {id!r} is not in the data any more"
        elif _asked(example) != [_plain(probe) for probe in record["probes"]]:
            yield f"record {id!r} has changed"
        elif name:
            group = _edited_together(example, name, examples, protocol)
            if example not in group:
                yield f"record {id!r} was edited in {name} and would be in another chunk now"
            elif name not in checked and not _writes(
                edits / f"{name}.safetensors", remaining(group, left_out)
            ):
                yield f"what edit {name} writes has changed"
            checked.add(name)
    if final and final != by_id.keys():
        yield "the run was scored after its last edit, and has other records now"


def _edited_together(
    example: EditExample, name: str, examples: Sequence[EditExample], protocol: Mapping[str, Any]
) -> Sequence[EditExample]:
    """The examples that an edit is of now: one alone, or a chunk, whose number its name has."""
    if protocol["mode"] == "single":
        return [example]
    number = name.rpartition("-")[2]
    parts = chunks(examples, protocol["chunk_size"])
    return parts[int(number)] if number.isdecimal() and int(number) < len(parts) else ()


def _writes(path: Path, requests: Sequence[EditRequest]) -> bool:
    """Whether a saved edit writes those of some requests that nothing later overwrites."""
    written = EditOrigin.from_json(read_edit(path)[0]["origin"]).requests
    return written == tuple(consistent(requests))


def _asked(example: EditExample) -> list[tuple[Any, ...]]:
    return [(p.kind, p.group, p.prompt, list(p.answers), p.contrast) for p in example.probes]


def _plain(probe: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(probe.get(name) for name in ("kind", "group", "prompt", "answers", "contrast"))
