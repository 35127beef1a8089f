"""Runs a benchmark: edits, scores and rolls back, chunk by chunk, as a protocol says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import compress
from typing import Any, TypeAlias, cast

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.memory_budget import memory_budget
from kedit_lightning.benchmark.costs import (
    Clock,
    TimedEdit,
    edit_costs,
    fixed_randomness,
    reset_peak,
)
from kedit_lightning.benchmark.example_records import file_name, probes_of, records_of
from kedit_lightning.benchmark.graders import Graders
from kedit_lightning.benchmark.reader import Reader
from kedit_lightning.benchmark.run_context import RunContext, new_metrics
from kedit_lightning.contradictions import remaining
from kedit_lightning.data.datamodule import Split
from kedit_lightning.edits import Edit
from kedit_lightning.errors import EditOrderError, KEditError, StreamStopped
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.requests import EditExample, EditRequest

EditFunction: TypeAlias = Callable[[Sequence[EditRequest]], Edit]
EditEachFunction: TypeAlias = Callable[[Sequence[Sequence[EditRequest]]], Iterable[Edit]]

#: Most bytes of edits that rows carry at once: eleven dense ones of a model of 7 billion weights.
CARRIED_BYTES = 1 << 31


class ProtocolRunner:
    """Runs the examples of a benchmark through an editing method.

    The global random numbers of an edit depend on the seed and the edit's name alone, so that a
    resumed run computes the same edits as an unbroken one, alone or together with others.

    Args:
        base: The base model.
        edit: Computes an edit from requests; it is applied and rolled back here.
        run: Protocol, seed, data and saved results of the run; its sinks take new edits and
            records.
        split: The split of the data that the examples come from.
        edit_each: Computes the edits of several examples independently of each other, see
            ``EditMethod.edit_each``; one by one with ``edit`` if not given.
        ranks: Number of this process, and how many there are.  They deal out chunks in turn; all
            edits of a sequential run are computed by the first process.
    """

    def __init__(
        self,
        base: BaseModel,
        edit: EditFunction,
        run: RunContext,
        split: Split = "test",
        edit_each: EditEachFunction | None = None,
        ranks: tuple[int, int] = (0, 1),
    ) -> None:
        self.base = base
        self.protocol = run.protocol
        self.reader = Reader(base, run.protocol, str(run.source(split).get("sha256", "")))
        self.metrics = new_metrics(run.protocol, run.seed)
        self._graders = Graders(run.protocol, base.device)
        self._run, self._saved = run, run.saved
        self._compute = edit
        self._compute_each = edit_each or (lambda groups: map(edit, groups))
        #: Chunks of this process, where their number is known.
        self.chunks: float | None = None
        self._rank, self._world_size = ranks
        self._initial_edits = list(base.edits)
        #: What is scored at the end, chunk by chunk, with costs that no record has yet.
        self._edited: list[tuple[Sequence[EditExample], list[dict[str, Any]]]] = []
        #: Edits of `single` mode that are also scored together, by name.
        self._kept: dict[str, Edit] = {}
        #: Why a stream of edits has ended before its data has.
        self.stopped: StreamStopped | None = None

    # ---- what a loop calls

    def chunk(self, examples: Sequence[EditExample], index: int) -> Iterator[ExampleRecord]:
        """Edit and score chunk ``index`` of this process; yields each record once it is whole."""
        if not examples:
            return iter(())
        self._graders.load(examples)
        if self.protocol.grouping == "single":
            return self._single(examples)
        if self.protocol.grouping == "batch":
            return self._together(examples, index * self._world_size + self._rank)
        # Every process is given the whole stream; the first one edits and scores it.
        return iter(()) if self._rank or self.stopped else self._stream(examples, index)

    def finish(self) -> Iterator[ExampleRecord]:
        """Score what is scored at the end of a run, and roll everything back."""
        try:
            if self.stopped and not self._edited:
                raise self.stopped
            if self.protocol.grouping == "sequential" and self._edited:
                self._run.on_checkpoint(sum(len(chunk) for chunk, _ in self._edited))
            if "final" in self.protocol.moments and self._stand_together():
                yield from self._score_edited("final")
        finally:
            self.close()

    def close(self) -> None:
        """Restore the stack that the runner was created on."""
        for edit in reversed(list(self.base.edits)):
            if not any(edit is other for other in self._initial_edits):
                edit.rollback()
        self._edited, self._kept = [], {}

    # ---- modes

    def _single(self, examples: Sequence[EditExample]) -> Iterator[ExampleRecord]:
        """Each example under its own edit, which its rows carry beside those of other examples."""
        saved = [self._saved_record(example, "immediate") for example in examples]
        if all(saved):
            yield from (record for record in saved if record)
        else:
            # All again, also those with a record: rows read together round alike.
            clock, probes, start = Clock(self.base), probes_of(examples), 0
            owners = [number for number, example in enumerate(examples) for _ in example.probes]
            base = self.reader.base_readings(probes, owners)
            before = self.reader.readings(probes, base)
            seconds, earlier = clock.lap() / len(examples), iter(saved)
            reset_peak(self.base)
            for group in self._edit_groups(examples):
                clock.lap()
                span = slice(start, start + sum(len(example.probes) for example, _ in group))
                start = span.stop
                if len(group) == 1:
                    with group[0][1][0]:
                        after = self.reader.readings(probes[span], base[span])
                else:
                    carried = [edit for example, (edit, _) in group for _ in example.probes]
                    after = self.reader.readings(probes[span], base[span], carried)
                    del carried  # edits may be large, and the next group is computed soon
                own_seconds = seconds + clock.lap() / len(group)
                scored = [example for example, _ in group]
                records = records_of(scored, "immediate", base[span], before[span], after)
                for record, (example, timed) in zip(records, group, strict=True):
                    name = file_name(example.id)
                    (costs,) = edit_costs(self.base, name, timed, own_seconds, [example])
                    if self._stacks_single:
                        self._kept[name] = timed[0]
                    yield next(earlier) or self._new(record, timed[0], costs)
                del timed
        if self._stacks_single:
            self._edited.append((examples, []))

    @property
    def _stacks_single(self) -> bool:
        """Whether edits of `single` mode are applied together in the end, as they will be used."""
        return self._run.editing and self._world_size == 1

    def _stand_together(self) -> bool:
        """Apply the edits of `single` mode in order; false where they refuse each other."""
        if self.protocol.grouping != "single":
            return True
        examples = [example for chunk, _ in self._edited for example in chunk]
        if len(examples) < 2:
            return False
        named = [(file_name(example.id), example.requests) for example in examples]
        edits = [self._kept.get(name) or self._edit(name, own)[0] for name, own in named]
        try:
            with warnings.catch_warnings():  # that they were computed apart is what is measured
                warnings.filterwarnings("ignore", message=r"edit \S+ by .* was computed on top of")
                for edit in edits:
                    edit.apply()
        except EditOrderError:
            return False
        return True

    def _stream(self, examples: Sequence[EditExample], index: int) -> Iterator[ExampleRecord]:
        """One chunk of a sequential run, which may end here, without the edit of this chunk."""
        try:
            yield from self._together(examples, index)
        except StreamStopped as reason:
            self.stopped = reason

    def _together(self, examples: Sequence[EditExample], index: int) -> Iterator[ExampleRecord]:
        """One edit for the whole chunk; in a sequential run it stays on the stack."""
        stays = self.protocol.grouping == "sequential"
        name = f"chunk-{index:05d}"
        requests = remaining(examples, self._run.left_out)
        scored = not stays or "immediate" in self.protocol.moments
        saved = [self._saved_record(e, "immediate") for e in examples] if scored else []
        costs: list[dict[str, Any]] = []
        with nullcontext() if stays else self.base.edits.restored():
            if not scored:
                if requests:  # all may be left out
                    reset_peak(self.base)
                    edit = self._edit(name, requests)
                    edit[0].apply()
                    costs = edit_costs(self.base, name, edit, 0.0, examples)
            elif all(saved):
                if stays:
                    self._edit(name, requests)[0].apply()
                yield from (record for record in saved if record)
            else:
                clock, probes = Clock(self.base), probes_of(examples)
                base = self.reader.base_readings(probes)
                before = self.reader.readings(probes, base)
                seconds = clock.lap()
                reset_peak(self.base)
                edit = self._edit(name, requests)
                edit[0].apply()
                clock.lap()
                after = self.reader.readings(probes, base)
                seconds = (seconds + clock.lap()) / len(examples)
                own_costs = edit_costs(self.base, name, edit, seconds, examples)
                records = records_of(examples, "immediate", base, before, after)
                for record, earlier, own in zip(records, saved, own_costs, strict=True):
                    yield earlier or self._new(record, edit[0], own)
        if not stays:
            return
        self._edited.append((list(examples), costs))
        count = sum(len(chunk) for chunk, _ in self._edited)
        if not self.protocol.reaches(count - len(examples), count):
            return
        self._run.on_checkpoint(count)
        if index + 1 != self.chunks or "final" not in self.protocol.moments:
            yield from self._score_edited(f"after_{count}")

    def _score_edited(self, stage: str) -> Iterator[ExampleRecord]:
        """Score all examples so far on the stack as it stands, in the chunks of their edits."""
        for examples, costs in self._edited:
            saved = [self._saved_record(example, stage) for example in examples]
            if all(saved):
                yield from (record for record in saved if record)
                continue
            clock, probes = Clock(self.base), probes_of(examples)
            base = self.reader.base_readings(probes)
            after = self.reader.readings(probes, base)
            seconds = clock.lap() / len(examples)
            for own in costs:
                own["timing"]["eval_seconds"] = seconds
            # The state before an edit is long gone here: the base model stands in for it.
            records = records_of(examples, stage, base, base, after)
            known = costs or [{}] * len(examples)
            for record, earlier, own in zip(records, saved, known, strict=True):
                yield earlier or self._new(record, None, own)

    # ---- edits

    def _edit(self, name: str, requests: Sequence[EditRequest]) -> TimedEdit:
        """Compute an edit, or take the saved one."""
        saved = None if self._saved is None else self._saved.edit(name, self.base, requests)
        if saved is not None:
            return saved, None
        return self._computed(name, partial(self._compute, requests))

    def _computed(self, name: str, compute: Callable[[], Edit], shared: float = 0.0) -> TimedEdit:
        """A new edit, which took its part of shared seconds beside its own."""
        clock = Clock(self.base)
        with fixed_randomness(self._run.seed, name):
            try:
                edit = compute()
            except KEditError as error:
                error.add_note(f"this happened in edit '{name}'")
                raise
        seconds = shared + clock.lap()
        try:
            self._run.on_computed(name, edit)
        except StreamStopped as reason:
            if not reason.keeps or self.protocol.grouping != "sequential":
                raise
            self.stopped = reason
        self._run.on_edit(name, edit)
        return edit, seconds

    def _edits(self, examples: Sequence[EditExample]) -> Iterator[TimedEdit]:
        """The edit of each example on the stack as it stands: a saved one, or computed.

        A method that does not compute them together computes each when it is asked for.  One that
        does computes all of them again where some are missing, since they round together.
        """
        names = [file_name(example.id) for example in examples]
        missing = {n for n in names if self._saved is None or not self._saved.has_edit(n)}
        clock, shared = Clock(self.base), 0.0
        computed: Iterator[Edit] = iter(())
        if missing:
            wanted = [name in missing for name in names]
            groups = [example.requests for example in examples]
            with fixed_randomness(self._run.seed, names[0]):
                edits = self._compute_each(groups)
                if isinstance(edits, Sequence):
                    computed = (edits[i] for i, new in enumerate(wanted) if new)
                else:
                    computed = iter(self._compute_each([*compress(groups, wanted)]))
            shared = clock.lap() / len(missing)
        for example, name in zip(examples, names, strict=True):
            if name in missing:
                yield self._computed(name, partial(next, computed), shared)
            else:
                yield self._edit(name, example.requests)

    def _edit_groups(
        self, examples: Sequence[EditExample]
    ) -> Iterator[list[tuple[EditExample, TimedEdit]]]:
        """Examples with their edits, in groups whose rows share forward passes.

        An edit that rows cannot carry is alone in its group.  A group is emptied when the next is
        asked for.  When an edit fails, those computed before it are yielded first.
        """
        group: list[tuple[EditExample, TimedEdit]] = []
        held, most = 0, min(CARRIED_BYTES, memory_budget(self.base.device))
        try:
            for example, timed in zip(examples, self._edits(examples), strict=True):
                alone = not timed[0].can_be_carried
                if group and alone:
                    yield group
                    group.clear()
                group.append((example, timed))
                held += timed[0].nbytes
                if held >= most or alone:
                    yield group
                    group.clear()
                    held = 0
        except KEditError:
            if group:
                yield group
            raise
        if group:
            yield group

    # ---- records

    def _saved_record(self, example: EditExample, stage: str) -> ExampleRecord | None:
        return None if self._saved is None else self._saved.record(example.id, stage)

    def _new(
        self, record: ExampleRecord, edit: Edit | None, costs: dict[str, Any]
    ) -> ExampleRecord:
        """Complete a record and hand it on."""
        record = self._graders.complete(cast(ExampleRecord, {**record, **costs}))
        self._run.on_record(record, edit)
        return record
