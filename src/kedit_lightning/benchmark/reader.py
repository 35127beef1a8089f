"""Measures probes on a base model, in as few forward passes as possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias, cast

import torch

from kedit_lightning.base_models import BaseModel, EncodedRow
from kedit_lightning.base_models.foreign_hooks import foreign_hooks
from kedit_lightning.base_models.prefix_states import PrefixStates
from kedit_lightning.base_models.shared_prompts import can_share
from kedit_lightning.benchmark.answer_cache import AnswersCache, key_of
from kedit_lightning.benchmark.answer_logits import (
    AnswerLogits,
    ForcedRow,
    parts_of_questions,
)
from kedit_lightning.benchmark.free_texts import (
    Asked,
    Carried,
    FreeTexts,
    Question,
    Wanted,
    carrying,
    question_of,
    questions,
)
from kedit_lightning.benchmark.protocol import READING_VERSION, Protocol
from kedit_lightning.benchmark.row_logits import probe_row, row_pass
from kedit_lightning.decoding_settings import generation_config, in_force
from kedit_lightning.errors import article_list
from kedit_lightning.image_reference import content_hash, references
from kedit_lightning.metrics import SCORINGS, ForwardPass, ProbeReading
from kedit_lightning.metrics.measurement import RECORDED, Measurement, Source, Value, built_in
from kedit_lightning.requests import Probe

Compute: TypeAlias = Callable[[ForwardPass], Sequence[Value]]


#: Rows of a probe, by the source of measurements.
Rows: TypeAlias = dict[Source, list[ForcedRow]]
Values: TypeAlias = dict[tuple[ForcedRow, Compute], Value]

#: Sources whose rows share forward passes.
_PASSES: tuple[tuple[Source, ...], ...] = (
    ("answer", "answers", "contrast", "against"),
    ("continuation",),
)


def prompts_are_shared(base: BaseModel, asked: Sequence[Question]) -> bool:
    """Whether the prompts of questions can be read once for all that follows them."""
    if not asked or any(image is not None for _, _, image in asked):
        return False
    with carrying(base, list(dict.fromkeys(edit for edit, _, _ in asked))):
        return can_share(base)


class Reader:
    """Measures what the metrics of a protocol's scoring declare, on a base model as it stands.

    Rows are sorted by length and cut into batches, each row once for its tokens and the edit it
    carries, so a value does not depend on how probes are ordered or grouped.

    Args:
        base: The base model.
        protocol: What is measured, and how many rows a forward pass takes.
        dataset: Hash of the data the probes come from; the cache has a file a dataset.
    """

    def __init__(self, base: BaseModel, protocol: Protocol, dataset: str = "") -> None:
        self.base = base
        self.protocol = protocol
        #: What prompts begin with under in-context edits is read once.
        self.prefixes = PrefixStates(base)
        self.texts = FreeTexts(base, protocol, self.prefixes)
        #: Measurements of a probe by its kind, for each task.
        self._measurements = cache(SCORINGS[protocol.scoring].measurements)
        self._measurements("")  # names that are taken are refused at once
        self.cache = AnswersCache(
            {
                "version": READING_VERSION,
                "model": base.full_fingerprint,  # a sample of the weights may miss what changed
                "tokenizer": base.tokenizer_fingerprint,
                "chat": base.encoder.chat,
                "device": base.device.type,
                "attention": getattr(base.model.config, "_attn_implementation", None),
                "scoring": protocol.scoring,
                "max_new_tokens": protocol.max_new_tokens if protocol.generates else 0,
                **({"sample_tokens": protocol.sample_tokens} if protocol.sample_tokens else {}),
                "decoding": in_force(generation_config(base.model), protocol.generation),
                "dataset": dataset,
            },
            on_disk=not self._warn_of_hooks(),
        )

    def _warn_of_hooks(self) -> bool:
        """Whether the model carries hooks of others, whose answers no later run may read."""
        names = foreign_hooks(self.base.model)
        if names:
            warnings.warn(
                f"'{self.base.name}' carries forward hooks that kedit-lightning has not made, on "
                f"{article_list(names, 3)}; its answers are measured with them, and not kept for "
                "later runs; remove them if they should not act",
                stacklevel=2,
            )
        return bool(names)

    def base_readings(self, probes: Sequence[Probe]) -> list[ProbeReading]:
        """Readings of the base model without any edit, from the cache where it has them."""
        keys = [self._cache_key(probe) for probe in probes]
        by_key = dict(zip(keys, probes, strict=True))
        missing = {key: by_key[key] for key in by_key if key not in self.cache.known}
        if missing:
            with self.base.edits.suspended():
                fresh = self.readings(list(missing.values()), None)
            self.cache.add(dict(zip(missing, fresh, strict=True)))
        return [self.cache.known[key] for key in keys]

    def readings(
        self,
        probes: Sequence[Probe],
        base_readings: Sequence[ProbeReading] | None,
        carried: Sequence[Carried] | None = None,
    ) -> list[ProbeReading]:
        """Readings of the model under the edits that are applied now.

        Where prompts can be read once for all that follows them, parts of as many prompts as a
        forward pass takes are read one after another.

        Args:
            probes: The probes.
            base_readings: Their readings from :meth:`base_readings`; ``None`` where those are read.
            carried: For each probe an edit that only its rows carry, or ``None``.

        Raises:
            UnsupportedUseError: An edit is of a kind that rows cannot carry.
        """
        carried = carried or [None] * len(probes)
        if base_readings is not None and not self.base.edits.active and not any(carried):
            return list(base_readings)
        asked = list(zip(carried, probes, strict=True))
        places: dict[Question, list[int]] = {}
        for i, one in enumerate(asked):
            places.setdefault(question_of(one), []).append(i)
        if not prompts_are_shared(self.base, list(places)):
            return self._read(asked, base_readings, AnswerLogits(self.base, self.prefixes))
        found: dict[int, ProbeReading] = {}
        ordered, size = questions(self.base, asked), self.protocol.score_batch_size
        for part in parts_of_questions(self.base, ordered, size):
            numbers = [i for question in part for i in places[question]]
            own = None if base_readings is None else [base_readings[i] for i in numbers]
            passes = AnswerLogits(self.base, self.prefixes, part)
            read = self._read([asked[i] for i in numbers], own, passes)
            found |= zip(numbers, read, strict=True)
        return [found[i] for i in range(len(asked))]

    def _measured(self, probe: Probe) -> tuple[Measurement, ...]:
        """Measurements of a probe."""
        found = self._measurements(probe.task.name if probe.task else "")[probe.kind]
        sampled = self.protocol.sample_tokens > 0
        return tuple(m for m in found if sampled or m.source != "sample")

    def _has(self, probe: Probe, source: Source) -> bool:
        return any(measurement.source == source for measurement in self._measured(probe))

    def _cache_key(self, probe: Probe) -> str:
        added = {m.name for m in self._measured(probe)}.difference(built_in(probe.kind))
        local = probe.kind == "locality"
        against = probe.task.against if probe.task and self._has(probe, "against") else ()
        seen = [content_hash(reference) for reference in references(probe.image)]
        parts = (local, probe.prompt, probe.answers, probe.contrast, *sorted(added), *against)
        return key_of(*parts, *([{"images": seen}] if seen else []))

    # ---- forward passes

    @torch.no_grad()
    def _read(
        self,
        asked: Sequence[Asked],
        against: Sequence[ProbeReading] | None,
        passes: AnswerLogits,
    ) -> list[ProbeReading]:
        """Readings of some probes.

        All forward passes run here, one batch after another: free generation, then along the
        answers, then along the base model's continuations.
        """
        texts = self._generated(self.texts.sentences(asked), passes)
        plans: dict[Source, Callable[[Iterable[Asked]], Iterable[Wanted]]] = {
            "passage": self.texts.passages,
            "sample": self.texts.samples,
        }
        long = {
            source: self._generated(plan([one for one in asked if self._has(one[1], source)]))
            for source, plan in plans.items()
        }
        encode = cache(self.base.encode)
        rows: list[Rows] = []
        for i, (edit, probe) in enumerate(asked):
            # Under edits the continuation is the one that was read of the base model before.
            text = against[i].get("text") if against else texts.get((edit, probe))
            rows.append(self._rows(edit, probe, text, against is not None, encode))
        values: Values = {}
        for sources in _PASSES:
            computes = dict.fromkeys(
                m.compute
                for _, probe in asked
                for m in self._measured(probe)
                if m.source in sources
            )
            forced = dict.fromkeys(row for own in rows for name in sources for row in own[name])
            for batch in passes.batches(forced, self.protocol.score_batch_size):
                forward = passes.of(batch)
                for compute in computes:
                    keys = ((row, compute) for row in batch)
                    values.update(zip(keys, compute(forward), strict=True))
                del forward  # before the next pass takes as much memory
        for own, (_, probe) in zip(rows, asked, strict=True):
            for row in own["row"]:  # one at a time: a picture has hundreds of positions
                with carrying(self.base, [row.edit]):
                    forward = row_pass(self.base, row.tokens, row.plain)
                for measurement in self._measured(probe):
                    if measurement.source == "row":
                        values[row, measurement.compute] = measurement.compute(forward)[0]
        return [
            self._reading(
                one[1],
                own,
                texts.get(one),
                {source: found.get(one) for source, found in long.items()},
                values,
            )
            for one, own in zip(asked, rows, strict=True)
        ]

    def _generated(
        self, wanted: Iterable[Wanted], passes: AnswerLogits | None = None
    ) -> dict[Asked, str]:
        """Free generations, each prompt once for the edit that its row carries."""
        found: dict[Asked, str] = {}
        for some in wanted:
            texts: dict[Question, str] = {}
            for batch in some.batches(self.base, self.protocol.score_batch_size):
                edits, prompts, images = zip(*batch, strict=True)
                options = dict(some.options)
                if passes is not None:
                    options |= passes.generating(batch)
                with carrying(self.base, edits):
                    answers = self.base.generate(prompts, images=images, **options)
                texts |= zip(batch, answers, strict=True)
            found |= {(e, p): texts[e, p.prompt, p.image] for e, p in some.asked}
        return found

    def _reading(
        self,
        probe: Probe,
        rows: Rows,
        text: str | None,
        long: Mapping[Source, str | None],
        values: Values,
    ) -> ProbeReading:
        """The measured values of one probe, by name."""
        reading: dict[str, Value] = {measurement.name: None for measurement in RECORDED}
        for measurement in self._measured(probe):
            by_row: list[Any] = [
                values[row, measurement.compute] for row in rows.get(measurement.source, ())
            ]
            if by_row:
                reading[measurement.name] = measurement.together(by_row)
            elif measurement.source in long:
                reading[measurement.name] = long[measurement.source]
        return cast(ProbeReading, {**reading, "text": text})

    # ---- rows

    def _rows(
        self,
        edit: Carried,
        probe: Probe,
        text: str | None,
        compare: bool,
        encode: Callable[..., EncodedRow],
    ) -> Rows:
        """Rows of a probe by source; that of ``text``, the continuation, only where measured."""

        def forced(answers: Iterable[str]) -> list[ForcedRow]:
            rows = (encode(probe.prompt, answer, image=probe.image) for answer in answers)
            return [ForcedRow(edit, row) for row in rows]

        accepted = forced(probe.answers)
        contrast = [probe.contrast] if probe.contrast else []
        against = probe.task.against if probe.task and self._has(probe, "against") else ()
        continued = self._has(probe, "continuation")
        return {
            "answer": accepted[:1],
            "answers": accepted,
            "contrast": forced(contrast),
            "against": forced(against),
            "continuation": [self._continuation(edit, probe, text, compare)] if continued else [],
            "row": [self._row(edit, probe, compare)] if self._has(probe, "row") else [],
        }

    def _row(self, edit: Carried, probe: Probe, compare: bool) -> ForcedRow:
        """The row whose logits are all read, and the unedited one where they are compared."""
        row = probe_row(self.base, probe)
        with self.base.edits.suspended():
            return ForcedRow(edit, row, probe_row(self.base, probe) if compare else None)

    def _continuation(
        self, edit: Carried, probe: Probe, text: str | None, compare: bool
    ) -> ForcedRow:
        """The row of the base model's continuation ``text`` of a prompt.

        Where nothing was generated, the probe's own answer is fed, or else only the position behind
        the prompt is read.
        """
        base, encoder = self.base, self.base.encoder
        answer = probe.answers[0] if text is None and probe.answers else None
        images = references(probe.image)
        plain = encoder.encode(probe.prompt, answer, images=images)
        ids = plain.answer
        if answer is None:
            # The ids as the model generated them, not as they would be joined to the prompt; text
            # of more tokens than were generated is fed as far as there is room.
            ids = tuple(base.tokenizer(text or "", add_special_tokens=False)["input_ids"])
            ids = ids[: min(self.protocol.max_new_tokens, base.max_tokens - len(plain.prompt))]
            # Without a text the position behind the prompt is read; the token there is not.
            ids = ids or (base.pad_id,)
        if not compare:
            return ForcedRow(edit, replace(plain, answer=ids))
        room = base.max_tokens - len(ids) - 2
        prompt = base.edits.render(
            probe.prompt, lambda text: room - encoder.count_prompt(text, images), images
        )
        row = plain if prompt == probe.prompt else encoder.encode(prompt, images=images)
        ids = ids[: max(1, base.max_tokens - len(row.prompt))]
        return ForcedRow(edit, replace(row, answer=ids), replace(plain, answer=ids))
