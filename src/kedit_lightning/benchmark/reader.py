"""Measures probes on a base model, in as few forward passes as possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch

from kedit_lightning.base_models import BaseModel, EncodedRow
from kedit_lightning.base_models.foreign_hooks import foreign_hooks
from kedit_lightning.base_models.plain_prompts import PlainPrompts
from kedit_lightning.base_models.prefix_states import PrefixStates
from kedit_lightning.base_models.shared_prompts import can_share
from kedit_lightning.benchmark.answer_cache import AnswersCache, key_of
from kedit_lightning.benchmark.answer_logits import (
    AnswerLogits,
    ForcedRow,
    OpenAnswer,
    parts_of_questions,
)
from kedit_lightning.benchmark.begun_answers import BegunAnswers, is_plain
from kedit_lightning.benchmark.free_texts import (
    Asked,
    Carried,
    FreeTexts,
    Question,
    Wanted,
    by_length,
    carrying,
    question_of,
)
from kedit_lightning.benchmark.probe_rows import ProbeRows, Rows
from kedit_lightning.benchmark.protocol import READING_VERSION, Protocol
from kedit_lightning.benchmark.row_logits import row_pass
from kedit_lightning.benchmark.row_values import Values, computed, reading, wants
from kedit_lightning.decoding_settings import generation_config, in_force
from kedit_lightning.edits.effects import ChangeLogits, RewritePrompt
from kedit_lightning.errors import article_list
from kedit_lightning.image_reference import content_hash, references
from kedit_lightning.metrics import SCORINGS, ProbeReading
from kedit_lightning.metrics.measurement import Measurement, Source, built_in
from kedit_lightning.requests import Probe


def prompts_are_shared(base: BaseModel, asked: Sequence[Question]) -> bool:
    """Whether the prompts of questions can be read once for all that follows them."""
    if not asked or any(image is not None for _, _, image in asked):
        return False
    with carrying(base, list(dict.fromkeys(edit for edit, _, _ in asked))):
        return can_share(base)


def rows_are_joined(base: BaseModel, asked: Sequence[Question]) -> bool:
    """Whether rows behind one prompt, read whole, may be read in one where they begin alike."""
    if base.is_encoder_decoder or any(image is not None for _, _, image in asked):
        return False
    edits = base.edits
    if not edits.active:
        return True
    rewrites, changes = edits.effects(RewritePrompt), edits.effects(ChangeLogits)
    return not rewrites and not changes


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
        self._rows, self._begun = ProbeRows(base, protocol), BegunAnswers(base, protocol)
        #: What the base model has read of prompts, for what is compared with it under edits.
        self._plain = PlainPrompts(base)
        self._encode = cache(base.encode)
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

    def base_readings(
        self, probes: Sequence[Probe], owners: Sequence[object] | None = None
    ) -> list[ProbeReading]:
        """Readings of the base model without any edit, from the cache where it has them.

        Args:
            probes: The probes.
            owners: What will have an edit of its own, for each probe: prompts are then read as
                often as they will be under edits, which are compared with the same passes.
        """
        keys = [self._cache_key(probe) for probe in probes]
        by_key = dict(zip(keys, probes, strict=True))
        missing = {key: by_key[key] for key in by_key if key not in self.cache.known}
        if missing:
            owned = zip(owners or [None] * len(probes), probes, strict=True)
            once = dict.fromkeys((owner, probe.prompt, probe.image) for owner, probe in owned)
            self._plain.clear()
            with self.base.edits.suspended():
                fresh = self.readings(
                    list(missing.values()), None, asked_as=[(None, p, i) for _, p, i in once]
                )
            self.cache.add(dict(zip(missing, fresh, strict=True)))
        return [self.cache.known[key] for key in keys]

    def readings(
        self,
        probes: Sequence[Probe],
        base_readings: Sequence[ProbeReading] | None,
        carried: Sequence[Carried] | None = None,
        asked_as: Sequence[Question] = (),
    ) -> list[ProbeReading]:
        """Readings of the model under the edits that are applied now.

        Where prompts can be read once for all that follows them, parts of as many prompts as a
        forward pass takes are read one after another.

        Args:
            probes: The probes.
            base_readings: Their readings from :meth:`base_readings`; ``None`` where those are read.
            carried: For each probe an edit that only its rows carry, or ``None``.
            asked_as: Questions that prompts are read as, some more than once; each once by default.

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
            joined = rows_are_joined(self.base, list(places))
            passes = AnswerLogits(self.base, self.prefixes, joined=joined)
            return self._read(asked, base_readings, passes)
        found: dict[int, ProbeReading] = {}
        # Continuations are compared with the base model, which reads the prompts of their part too.
        compared = {(p.prompt, p.image) for p in probes if self._has(p, "continuation")}
        ordered, size = by_length(self.base, asked_as or places), self.protocol.score_batch_size
        ordered.sort(key=lambda question: question[1:] in compared)
        for part in parts_of_questions(self.base, ordered, size):
            numbers = [i for q in dict.fromkeys(part) for i in places.pop(q, ())]
            own = None if base_readings is None else [base_readings[i] for i in numbers]
            passes = AnswerLogits(self.base, self.prefixes, part, self._plain)
            if numbers:
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

        All forward passes run here, one batch after another: along answers and along the base
        model's continuations, which show how free answers begin, then free generation.
        """
        answers = self._open_answers(asked, passes)
        texts = {} if answers else self._generated(self.texts.sentences(asked), passes)
        plans: dict[Source, Callable[[Iterable[Asked]], Iterable[Wanted]]] = {
            "passage": self.texts.passages,
            "sample": self.texts.samples,
        }
        long = {
            source: self._generated(plan([one for one in asked if self._has(one[1], source)]))
            for source, plan in plans.items()
        }
        encode, compare, values = self._encoder(), against is not None, Values()
        measured = [self._measured(probe) for _, probe in asked]
        rows = [
            self._rows.along_answers(*one, {m.source for m in own}, compare, encode)
            for one, own in zip(asked, measured, strict=True)
        ]
        # What continues a prompt is read when it is known, in passes of its own, so that those
        # along answers have one shape with and without edits.
        for continued in (False, True):
            guesses: list[ForcedRow] = []
            if continued:
                if not compare:
                    texts, answers = texts | self._finished(passes, asked, answers), {}
                guesses = self._continue(asked, rows, against, texts)
            wanted = wants(zip(measured, rows, strict=True), values)
            size = self.protocol.score_batch_size
            for batch in passes.batches(wanted, guesses if answers else (), size):
                read = passes.of(batch)
                values |= computed(read, wanted)
                passes.shown(read, answers, self._begun)
                del read  # before the next pass takes as much memory
        texts |= self._finished(passes, asked, answers)
        for own, (_, probe) in zip(rows, asked, strict=True):
            for row in own["row"]:  # one at a time: a picture has hundreds of positions
                with carrying(self.base, [row.edit]):
                    forward = row_pass(self.base, row.tokens, row.plain)
                for measurement in self._measured(probe):
                    if measurement.source == "row":
                        values[row, measurement.compute] = measurement.compute(forward)[0]
        return [
            reading(
                own_measured,
                own,
                texts.get(one),
                {source: found.get(one) for source, found in long.items()},
                values,
            )
            for one, own, own_measured in zip(asked, rows, measured, strict=True)
        ]

    def _continue(
        self,
        asked: Sequence[Asked],
        rows: Sequence[Rows],
        against: Sequence[ProbeReading] | None,
        texts: Mapping[Asked, str],
    ) -> list[ForcedRow]:
        """Add rows along the continuations of the base model, which guess free answers under edits.

        Under edits the continuation is the one that was read of the base model before.  In guesses
        a token stands behind it, for what comes next.
        """
        guesses: list[ForcedRow] = []
        read: Sequence[ProbeReading | None] = against or [None] * len(asked)
        for one, own, before in zip(asked, rows, read, strict=True):
            text = texts.get(one) if before is None else before.get("text")
            if self._has(one[1], "continuation"):
                row = self._rows.continuation(*one, text, before is not None)
                own["continuation"] = [row]
                answer = (*row.tokens.answer, self.base.pad_id)
                guesses += [row._replace(tokens=replace(row.tokens, answer=answer))]
        return guesses

    def _encoder(self) -> Callable[..., EncodedRow]:
        """Makes rows of prompts and answers, each once, or once for the edits that rewrite them."""
        edits = self.base.edits
        if edits.active and edits.effects(RewritePrompt):
            return cache(self.base.encode)
        return self._encode

    def _open_answers(
        self, asked: Sequence[Asked], passes: AnswerLogits
    ) -> dict[Question, OpenAnswer]:
        """Free answers that passes along other tokens may begin; none where they must not."""
        if not (passes.shows_answers and is_plain(self.base, self.protocol)):
            return {}
        found: dict[Question, OpenAnswer] = {}
        for some in self.texts.sentences(asked):
            for one in some.asked:
                prompt = self._encode(one[1].prompt).prompt
                found.setdefault(question_of(one), OpenAnswer((one[0], prompt)))
        return found

    def _finished(
        self, passes: AnswerLogits, asked: Sequence[Asked], answers: Mapping[Question, OpenAnswer]
    ) -> dict[Asked, str]:
        """Free answers, those without a cache to go on from generated from their beginning."""
        found = passes.finished(answers, self._begun)
        texts = {one: found[question_of(one)] for one in asked if question_of(one) in found}
        missing = [one for one in asked if question_of(one) in answers and one not in texts]
        return texts | (self._generated(self.texts.sentences(missing)) if missing else {})

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
