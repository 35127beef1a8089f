"""Records of scored examples, from the readings of their probes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

from kedit_lightning.metrics import ExampleRecord, ProbeReading, ProbeRecord
from kedit_lightning.requests import EditExample, Probe


def records_of(
    examples: Sequence[EditExample],
    stage: str,
    base: Sequence[ProbeReading],
    before: Sequence[ProbeReading],
    after: Sequence[ProbeReading],
) -> Iterator[ExampleRecord]:
    """A record for each example, from the readings of all their probes in order."""
    readings = zip(base, before, after, strict=True)
    for example in examples:
        own = zip(example.probes, readings, strict=False)
        probes = [_record_of(probe, *states) for probe, states in own]
        subject = example.requests[0].subject
        yield ExampleRecord(id=example.id, stage=stage, subject=subject, probes=probes)


def _record_of(
    probe: Probe, base: ProbeReading, before: ProbeReading, after: ProbeReading
) -> ProbeRecord:
    record = ProbeRecord(
        kind=probe.kind,
        group=probe.group,
        prompt=probe.prompt,
        answers=list(probe.answers),
        contrast=probe.contrast,
        base=base,
        before=before,
        after=after,
    )
    return record if probe.task is None else {**record, "task": probe.task.to_json()}


def probes_of(examples: Sequence[EditExample]) -> list[Probe]:
    """The probes of all examples, in order."""
    return [probe for example in examples for probe in example.probes]


def file_name(id: str) -> str:
    """A file name for an example: its id, with a hash where the id cannot be a file name.

    >>> file_name("12"), file_name("a/b")
    ('12', 'a-b-c14cddc0')
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]", "-", id).lstrip(".")[:80]
    return id if safe == id else f"{safe}-{hashlib.sha256(id.encode()).hexdigest()[:8]}"
