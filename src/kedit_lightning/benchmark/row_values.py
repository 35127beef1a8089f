"""What is measured of the rows of probes, and readings made of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

from kedit_lightning.benchmark.answer_logits import ForcedRow, PathLogits
from kedit_lightning.benchmark.probe_rows import Rows
from kedit_lightning.metrics import ForwardPass, ProbeReading
from kedit_lightning.metrics.measurement import RECORDED, Measurement, Source, Value

Compute: TypeAlias = Callable[[ForwardPass], Sequence[Value]]
Values: TypeAlias = dict[tuple[ForcedRow, Compute], Value]
#: What is computed of each row.
Wants: TypeAlias = dict[ForcedRow, dict[Compute, None]]


def wants(
    probes: Iterable[tuple[Iterable[Measurement], Rows]], known: Collection[Any] = ()
) -> Wants:
    """Rows along answers, with what is computed of each.

    Args:
        probes: What is measured of each probe, and its rows.
        known: Rows and what has been computed of them.
    """
    wanted: Wants = {}
    for measured, rows in probes:
        for measurement in measured:
            for row in rows.get(measurement.source, ()) if measurement.source != "row" else ():
                if (row, measurement.compute) not in known:
                    wanted.setdefault(row, {})[measurement.compute] = None
    return wanted


def computed(read: PathLogits, wanted: Wants) -> Values:
    """What is wanted of the rows that a pass has read."""
    values: Values = {}
    for rows, forward in read.forwards():
        for compute in dict.fromkeys(compute for row in rows for compute in wanted[row]):
            values |= zip([(row, compute) for row in rows], compute(forward), strict=True)
    return values


def reading(
    measured: Iterable[Measurement],
    rows: Rows,
    text: str | None,
    long: Mapping[Source, str | None],
    values: Values,
) -> ProbeReading:
    """The measured values of one probe, by name."""
    found: dict[str, Value] = {measurement.name: None for measurement in RECORDED}
    for measurement in measured:
        by_row: list[Any] = [
            values[row, measurement.compute] for row in rows.get(measurement.source, ())
        ]
        if by_row:
            found[measurement.name] = measurement.together(by_row)
        elif measurement.source in long:
            found[measurement.name] = long[measurement.source]
    return cast(ProbeReading, {**found, "text": text})
