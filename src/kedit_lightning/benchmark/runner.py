"""Edits, scores and rolls back, chunk by chunk, as a protocol says."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias, cast

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark import protocol as protocols
from kedit_lightning.benchmark.costs import Clock, peak_bytes, reset_peak
from kedit_lightning.benchmark.edit_maker import (
    EditEachFunction,
    EditFunction,
    EditMaker,
    Made,
    SavedRun,
)
from kedit_lightning.benchmark.reader import Reader
from kedit_lightning.edits import Edit
from kedit_lightning.errors import KEditError
from kedit_lightning.metrics import ExampleRecord, ProbeReading, ProbeRecord
from kedit_lightning.requests import EditExample, Probe

#: Bytes of edits that rows carry at once.  A dense edit of one matrix of a model of 7 billion
#: weights takes 180 MB in float32: eleven of them are held, and low-rank edits are never cut.
CARRIED_BYTES = 1 << 31


@dataclass(frozen=True)
class Scored:
    """An example scored at a stage.

    Args:
        record: Its record.
        edit: The edit that was in force for it; ``None`` at later stages of a sequential run.
        replayed: Whether the record comes from an interrupted run.
    """

    record: ExampleRecord
    edit: Edit | None = None
    replayed: bool = False


#: Readings of an example on the base model, and as the model stands before its edit.
_States: TypeAlias = tuple[list[ProbeReading], list[ProbeReading]]


class ProtocolRunner:
    """Runs the examples of a benchmark through an editing method.

    Args:
        base: The base model.
        edit: Computes an edit from requests; it is applied and rolled back here.
        protocol: How edits are applied and scored.
        dataset: Hash of the data, under which base-model answers are cached.
        seed: Start of global random numbers, set anew for every edit so that a resumed run
            computes the same edits as an unbroken one.
        saved: What an interrupted run has left behind.
        on_edit: Called with the name and the edit as soon as it has been computed.
        edit_each: Computes the edits of several examples apart from each other; one by one with
            ``edit`` if not given.
    """

    def __init__(
        self,
        base: BaseModel,
        edit: EditFunction,
        protocol: protocols.Protocol,
        dataset: str = "",
        seed: int = 0,
        saved: SavedRun | None = None,
        on_edit: Callable[[str, Edit], None] | None = None,
        edit_each: EditEachFunction | None = None,
    ) -> None:
        self.base = base
        self.protocol = protocol
        self.reader = Reader(base, protocol, dataset)
        self._maker = EditMaker(base, edit, edit_each, seed, saved, on_edit)
        self._saved = saved
        self._before = list(base.edits)
        self._stream: list[list[EditExample]] = []
        self._count = 0

    # ---- what a loop calls

    def chunk(
        self, examples: Sequence[EditExample], index: int, last: bool = False
    ) -> Iterator[Scored]:
        """Edit and score a chunk; a record is given out as soon as it is complete.

        Args:
            examples: The chunk.
            index: Its number in the data, from zero.
            last: Whether it is the last one.
        """
        if self.protocol.mode == "single":
            yield from self._single(examples)
        elif self.protocol.mode == "batch":
            with self.base.edits.restored():
                yield from self._together(examples, index, stay=False)
        else:
            yield from self._sequential(examples, index, last)

    def finish(self) -> Iterator[Scored]:
        """Score what is scored at the end of a sequential run, and roll everything back."""
        try:
            if self.protocol.mode == "sequential" and "final" in self.protocol.moments:
                yield from self._later("final")
        finally:
            self.close()

    def close(self) -> None:
        """Bring the stack back to where it was when the runner was made."""
        if list(self.base.edits) != self._before:
            for edit in reversed(list(self.base.edits)):
                if not any(edit is other for other in self._before):
                    edit.rollback()
        self._stream = []

    # ---- modes

    def _single(self, examples: Sequence[EditExample]) -> Iterator[Scored]:
        """Each example under its own edit, which its rows carry beside those of other examples."""
        done = [self._old(example, "immediate") for example in examples]
        missing = [e for e, old in zip(examples, done, strict=True) if old is None]
        fresh = self._apart(missing) if missing else iter(())
        for old in done:
            yield next(fresh) if old is None else Scored(old, replayed=True)

    def _apart(self, examples: Sequence[EditExample]) -> Iterator[Scored]:
        clock = Clock(self.base)
        rest = zip(examples, self._states(examples), strict=True)
        seconds = clock.lap() / len(examples)
        reset_peak(self.base)
        wanted = [(_name(example.id), example.requests) for example in examples]
        for group in _carried_together(self._maker.each(wanted)):
            yield from self._carried(group, list(islice(rest, len(group))), seconds)

    def _carried(
        self, group: Sequence[Made], stated: Sequence[tuple[EditExample, _States]], seconds: float
    ) -> Iterator[Scored]:
        """Score examples in the same passes.

        Args:
            group: The edit of each example.
            stated: The examples, with what was read before.
            seconds: What reading before took, an example.
        """
        clock = Clock(self.base)
        examples = [example for example, _ in stated]
        base = [readings for _, (readings, _) in stated]
        if len(group) == 1:
            with group[0].edit:
                after = self._by_example(examples, base)
        else:
            edits = [
                made.edit
                for made, example in zip(group, examples, strict=True)
                for _ in example.probes
            ]
            after = self._by_example(examples, base, edits)
        seconds += clock.lap() / len(group)
        for made, (example, states), own in zip(group, stated, after, strict=True):
            record = self._record(example, "immediate", *states, own)
            yield Scored(self._with_costs(record, made, seconds), made.edit)

    def _together(
        self, examples: Sequence[EditExample], index: int, stay: bool
    ) -> Iterator[Scored]:
        """One edit for the whole chunk; it is left on the stack."""
        scored = not stay or "immediate" in self.protocol.moments
        done = [self._old(e, "immediate") if scored else None for e in examples]
        replayed = all(done)
        if replayed and not stay:
            yield from (Scored(record, replayed=True) for record in done if record)
            return
        clock = Clock(self.base)
        states = self._states(examples) if scored and not replayed else []
        seconds = clock.lap()
        reset_peak(self.base)
        requests = [request for example in examples for request in example.requests]
        made = self._maker.one(f"chunk-{index:05d}", requests)
        made.edit.apply()
        if replayed or not scored:
            yield from (Scored(record, replayed=True) for record in done if record)
            return
        clock.lap()
        after = self._by_example(examples, [base for base, _ in states])
        seconds = (seconds + clock.lap()) / len(examples)
        for example, old, (base, before), own in zip(examples, done, states, after, strict=True):
            if old is not None:
                yield Scored(old, replayed=True)
                continue
            record = self._record(example, "immediate", base, before, own)
            record = self._with_costs(record, made, seconds, len(examples))
            yield Scored(record, made.edit)

    def _sequential(
        self, examples: Sequence[EditExample], index: int, last: bool
    ) -> Iterator[Scored]:
        yield from self._together(examples, index, stay=True)
        self._stream.append(list(examples))
        before, self._count = self._count, self._count + len(examples)
        every = self.protocol.every
        final_follows = last and "final" in self.protocol.moments
        if every is not None and before // every < self._count // every and not final_follows:
            yield from self._later(f"after_{self._count}")

    def _later(self, stage: str) -> Iterator[Scored]:
        """Score everything edited so far, in the chunks it was edited in."""
        for examples in self._stream:
            done = [self._old(example, stage) for example in examples]
            if all(done):
                yield from (Scored(record, replayed=True) for record in done if record)
                continue
            base = self._split(examples, self.reader.base_readings(_probes(examples)))
            after = self._by_example(examples, base)
            for example, old, readings in zip(
                examples, done, zip(base, after, strict=True), strict=True
            ):
                if old is not None:
                    yield Scored(old, replayed=True)
                else:
                    # The state before an edit is long gone here: the base model stands in for it.
                    yield Scored(
                        self._record(example, stage, readings[0], readings[0], readings[1])
                    )

    # ---- readings and records

    def _states(self, examples: Sequence[EditExample]) -> list[_States]:
        """Readings of each example on the base model, and as the model stands before the edit."""
        base = self.reader.base_readings(_probes(examples))
        before = self.reader.readings(_probes(examples), base)
        return list(zip(self._split(examples, base), self._split(examples, before), strict=True))

    def _by_example(
        self,
        examples: Sequence[EditExample],
        base: Sequence[list[ProbeReading]],
        carried: Sequence[Edit] | None = None,
    ) -> list[list[ProbeReading]]:
        """Readings as the model stands, all examples together; each probe under its own edit."""
        flat = [reading for own in base for reading in own]
        return self._split(examples, self.reader.readings(_probes(examples), flat, carried))

    @staticmethod
    def _split(
        examples: Sequence[EditExample], readings: Sequence[ProbeReading]
    ) -> list[list[ProbeReading]]:
        rest = iter(readings)
        return [[next(rest) for _ in example.probes] for example in examples]

    def _old(self, example: EditExample, stage: str) -> ExampleRecord | None:
        return None if self._saved is None else self._saved.record(example.id, stage)

    @staticmethod
    def _record(
        example: EditExample,
        stage: str,
        base: Sequence[ProbeReading],
        before: Sequence[ProbeReading],
        after: Sequence[ProbeReading],
    ) -> ExampleRecord:
        probes = [
            ProbeRecord(
                kind=probe.kind,
                group=probe.group,
                prompt=probe.prompt,
                answers=list(probe.answers),
                contrast=probe.contrast,
                base=readings[0],
                before=readings[1],
                after=readings[2],
            )
            for probe, readings in zip(
                example.probes, zip(base, before, after, strict=True), strict=True
            )
        ]
        subject = example.requests[0].subject
        return ExampleRecord(id=example.id, stage=stage, subject=subject, probes=probes)

    def _with_costs(
        self, record: ExampleRecord, made: Made, seconds: float, examples: int = 1
    ) -> ExampleRecord:
        """Costs of an edit, shared out evenly among the examples it was made for.

        ``eval_seconds`` is the example's share of the passes it was read in with others.
        ``peak_bytes`` is the highest so far since the first edit of its chunk was begun: it covers
        all edits that rows carried by then.
        """
        own = None if made.seconds is None else made.seconds / examples
        costs: dict[str, Any] = {
            "edit_name": made.name,
            "edit_id": made.edit.id,
            "edit": {"bytes": made.edit.nbytes / examples},
            "timing": {"edit_seconds": own, "eval_seconds": seconds},
            "memory": {"peak_bytes": peak_bytes(self.base)},
        }
        return cast(ExampleRecord, {**record, **costs})


def _carried_together(edits: Iterator[Made]) -> Iterator[list[Made]]:
    """Cut edits into groups whose rows share passes: as many as may be held at once.

    An edit of a kind that rows cannot carry makes a group of its own.  A group is emptied when the
    next is asked for, so that both are never held.  When an edit fails, those made before it are
    given out first.
    """
    group: list[Made] = []
    held = 0
    try:
        for made in edits:
            alone = not made.edit.can_be_carried
            if group and alone:
                yield group
                group.clear()
            group.append(made)
            held += made.edit.nbytes
            if held >= CARRIED_BYTES or alone:
                yield group
                group.clear()
                held = 0
    except KEditError:
        if group:
            yield group
        raise
    if group:
        yield group


def _probes(examples: Sequence[EditExample]) -> list[Probe]:
    return [probe for example in examples for probe in example.probes]


def _name(id: str) -> str:
    """A file name for an example: its id, with a hash where the id cannot be a file name.

    >>> _name("12"), _name("a/b")
    ('12', 'a-b-c14cddc0')
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]", "-", id).lstrip(".")[:80]
    if safe == id:
        return id
    return f"{safe}-{hashlib.sha256(id.encode()).hexdigest()[:8]}"
