"""What a model is asked about an example, in as few forward passes as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, EncodedRow
from kedit_lightning.benchmark.answer_cache import AnswersCache, key_of
from kedit_lightning.benchmark.protocol import READING_VERSION, Protocol
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.edits import Edit
from kedit_lightning.metrics import ProbeReading
from kedit_lightning.metrics.functional import (
    exact_match,
    kl_divergence,
    mean_log_prob,
    token_match,
)
from kedit_lightning.requests import Probe

Row = TypeVar("Row")
#: The edit that a row carries on top of the stack, or none.
Carried: TypeAlias = Edit | None

#: Logits held at a time (numbers); rows are cut finer where the vocabulary is large.
_LOGITS = 1 << 26


@dataclass(frozen=True)
class AnswerScore:
    """What one teacher-forced answer showed."""

    token_match: float
    exact: bool
    log_prob: float
    top1: list[int]


@dataclass(frozen=True)
class PathScore:
    """What was seen along the base model's own continuation."""

    top1: list[int]
    kl: float


class Reader:
    """Asks a base model, as it stands, what probes want to know.

    Rows are told apart by their content and the edit they carry, sorted by length and cut into
    passes, so a reading does not depend on how probes are ordered or grouped.

    Args:
        base: The base model.
        protocol: What is measured, and how many rows a pass takes.
        dataset: Hash of the data the probes come from; the cache has a file a dataset.
    """

    def __init__(self, base: BaseModel, protocol: Protocol, dataset: str = "") -> None:
        self.base = base
        self.protocol = protocol
        self.cache = AnswersCache(
            {
                "version": READING_VERSION,
                "model": base.fingerprint,
                "tokenizer": base.tokenizer_fingerprint,
                "chat": base.encoder.chat,
                "device": base.device.type,
                "attention": getattr(base.model.config, "_attn_implementation", None),
                "scoring": protocol.scoring,
                "max_new_tokens": protocol.max_new_tokens if protocol.generates else 0,
                "dataset": dataset,
            }
        )

    def base_readings(self, probes: Sequence[Probe]) -> list[ProbeReading]:
        """What the base model says without any edit; from the cache where it is known."""
        keys = [
            key_of(probe.kind == "locality", probe.prompt, probe.answers, probe.contrast)
            for probe in probes
        ]
        missing = {
            key: probe
            for key, probe in zip(keys, probes, strict=True)
            if self.cache.get(key) is None
        }
        if missing:
            with self.base.edits.suspended():
                fresh = self._read(list(missing.values()), None, [None] * len(missing))
            self.cache.add(dict(zip(missing, fresh, strict=True)))
        return [self.cache.known[key] for key in keys]

    def readings(
        self,
        probes: Sequence[Probe],
        base_readings: Sequence[ProbeReading],
        carried: Sequence[Carried] | None = None,
    ) -> list[ProbeReading]:
        """What the model says under the edits that are applied now.

        Args:
            probes: The probes.
            base_readings: What :meth:`base_readings` gave for them.
            carried: An edit for each probe, or ``None``, under which it alone is read beside.

        Raises:
            UnsupportedUseError: An edit is of a kind that rows cannot carry.
        """
        carried = carried or [None] * len(probes)
        if not self.base.edits.active and not any(carried):
            return list(base_readings)
        return self._read(probes, base_readings, carried)

    # ---- putting readings together

    @torch.no_grad()
    def _read(
        self,
        probes: Sequence[Probe],
        against: Sequence[ProbeReading] | None,
        carried: Sequence[Carried],
    ) -> list[ProbeReading]:
        """Readings of the model as it stands; ``against`` is ``None`` on the base model itself."""
        asked = list(zip(carried, probes, strict=True))
        prompts = [(edit, probe.prompt) for edit, probe in asked]
        texts = self._texts(prompts)
        answers = self._answers(
            [
                (edit, probe.prompt, answer)
                for edit, probe in asked
                for answer in (*probe.answers, *([probe.contrast] if probe.contrast else []))
            ]
        )
        local = [i for i, p in enumerate(probes) if p.kind == "locality"]
        default = self.protocol.scoring == "default"
        # What is followed is what the base model said: under edits it has been read before.
        said = against or [ProbeReading(text=texts.get(own)) for own in prompts]
        along = {i: said[i].get("text") for i in (local if default else [])}
        paths = self._paths([(*asked[i], text) for i, text in along.items()], against is not None)
        seen = dict(zip(along, paths, strict=True))
        return [
            self._reading(edit, probe, texts.get(prompts[i]), answers, seen.get(i))
            for i, (edit, probe) in enumerate(asked)
        ]

    def _reading(
        self,
        edit: Carried,
        probe: Probe,
        text: str | None,
        answers: dict[tuple[Carried, str, str], AnswerScore],
        path: PathScore | None,
    ) -> ProbeReading:
        scores = [answers[edit, probe.prompt, answer] for answer in probe.answers]
        first = scores[0] if scores else None
        contrast = answers[edit, probe.prompt, probe.contrast] if probe.contrast else None
        reading = ProbeReading(
            tf_tok=first.token_match if first else None,
            tf_all=any(score.exact for score in scores) if scores else None,
            log_prob=first.log_prob if first else None,
            contrast_log_prob=contrast.log_prob if contrast else None,
            text=text,
        )
        if path is not None:
            reading["top1"] = path.top1
            reading["kl"] = path.kl
        elif probe.kind == "locality" and first is not None:
            reading["top1"] = first.top1
        return reading

    # ---- asking

    def _carrying(self, edits: Sequence[Carried]) -> AbstractContextManager[None]:
        """Inside, each row of a pass carries its edit."""
        return self.base.edits.carried(edits) if any(edits) else nullcontext()

    def _texts(self, asked: Sequence[tuple[Carried, str]]) -> dict[tuple[Carried, str], str]:
        """Free answers by edit and prompt."""
        if not self.protocol.generates:
            return {}
        unique = sorted(
            dict.fromkeys(asked), key=lambda own: (self.base.encoder.count(own[1]), own[1])
        )
        size = self.protocol.score_batch_size
        texts: dict[tuple[Carried, str], str] = {}
        for batch in chunks(unique, size):
            with self._carrying([edit for edit, _ in batch]):
                answers = self.base.generate(
                    [prompt for _, prompt in batch],
                    max_new_tokens=self.protocol.max_new_tokens,
                    batch_size=size,
                    stop_at_sentence=True,
                )
            texts |= zip(batch, answers, strict=True)
        return texts

    def _answers(
        self, asked: Sequence[tuple[Carried, str, str]]
    ) -> dict[tuple[Carried, str, str], AnswerScore]:
        """Scores of teacher-forced answers by edit, prompt and answer."""
        rows = {own: (own[0], self.base.encode(*own[1:])) for own in dict.fromkeys(asked)}
        scores: dict[tuple[Carried, EncodedRow], AnswerScore] = {}
        for batch in self._batches(list(dict.fromkeys(rows.values())), lambda row: row[1]):
            with self._carrying([edit for edit, _ in batch]):
                found = self._score_answers([row for _, row in batch])
            scores |= zip(batch, found, strict=True)
        return {own: scores[row] for own, row in rows.items()}

    def _score_answers(self, batch: Sequence[EncodedRow]) -> list[AnswerScore]:
        rows = self.base.pad(batch)
        logits = wide(self.base.answer_logits(rows))  # [batch, width, vocab]
        top1, mask = logits.argmax(-1), rows.answer_mask
        chosen = logits.log_softmax(-1).gather(-1, rows.answer_ids[..., None])[..., 0]
        shares = token_match(top1, rows.answer_ids, mask).tolist()
        exact = exact_match(top1, rows.answer_ids, mask).tolist()
        log_probs = mean_log_prob(chosen, mask).tolist()
        ids = [own[at].tolist() for own, at in zip(top1, mask, strict=True)]
        return [AnswerScore(*score) for score in zip(shares, exact, log_probs, ids, strict=True)]

    def _paths(
        self, asked: Sequence[tuple[Carried, Probe, str | None]], compare: bool
    ) -> list[PathScore]:
        """What is seen along the base model's continuation of each prompt.

        Without free answers it is the probe's own answer that is followed, or else the position
        behind the prompt.
        """
        rows = [(edit, *self._path_rows(probe, text, compare)) for edit, probe, text in asked]
        scores: dict[tuple[Carried, EncodedRow, EncodedRow], PathScore] = {}
        for batch in self._batches(list(dict.fromkeys(rows)), lambda row: row[1]):
            with self._carrying([edit for edit, *_ in batch]):
                found = self._score_paths([(row, plain) for _, row, plain in batch], compare)
            scores |= zip(batch, found, strict=True)
        return [scores[row] for row in rows]

    def _path_rows(
        self, probe: Probe, text: str | None, compare: bool
    ) -> tuple[EncodedRow, EncodedRow]:
        """The row under the edits, and the row without them: prompt edits rewrite prompts."""
        base = self.base
        with base.edits.suspended():
            answer = probe.answers[0] if text is None and probe.answers else None
            plain = base.encode(probe.prompt, answer)
        ids = plain.answer
        if answer is None:
            # The ids as the model wrote them, not as they would be joined to the prompt; text that
            # is cut into more tokens than it was written in is followed as far as there is room.
            ids = tuple(base.tokenizer(text or "", add_special_tokens=False)["input_ids"])
            ids = ids[: min(self.protocol.max_new_tokens, base.max_tokens - len(plain.prompt))]
            # Without a text the position behind the prompt is read; what stands there is not.
            ids = ids or (base.tokenizer.eos_token_id or 0,)
        row = plain
        if compare:
            room = base.max_tokens - len(ids) - 2
            prompt = base.edits.render(probe.prompt, lambda text: base.encoder.count(text) <= room)
            row = plain if prompt == probe.prompt else base.encoder.encode(prompt)
        return replace(row, answer=ids), replace(plain, answer=ids)

    def _score_paths(
        self, batch: Sequence[tuple[EncodedRow, EncodedRow]], compare: bool
    ) -> list[PathScore]:
        rows = self.base.pad([row for row, _ in batch])
        logits = wide(self.base.answer_logits(rows))  # [batch, width, vocab]
        top1, mask = logits.argmax(-1), rows.answer_mask
        divergences = [0.0] * len(batch)
        if compare:
            # Computed on the same rows in the same pass, so that no change gives exactly 0.
            same = all(row == plain for row, plain in batch)
            base_rows = rows if same else self.base.pad([plain for _, plain in batch])
            with self.base.edits.suspended():
                base_logits = wide(self.base.answer_logits(base_rows))
            divergences = kl_divergence(
                base_logits.log_softmax(-1), logits.log_softmax(-1), mask
            ).tolist()
        ids = [own[at].tolist() for own, at in zip(top1, mask, strict=True)]
        return [PathScore(*score) for score in zip(ids, divergences, strict=True)]

    def _batches(
        self, rows: list[Row], encoded: Callable[[Row], EncodedRow]
    ) -> Iterator[list[Row]]:
        """Cut rows into passes: sorted by length, so that little is padding."""

        def order(row: Row) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
            own = encoded(row)
            return len(own.answer), len(own.prompt), own.prompt, own.answer

        vocabulary = int(self.base.model.config.get_text_config().vocab_size)
        batch: list[Row] = []
        for row in sorted(rows, key=order):
            # The longest answer comes last, and with it the width of the logits.
            numbers = (len(batch) + 1) * max(1, len(encoded(row).answer)) * vocabulary
            if batch and (len(batch) == self.protocol.score_batch_size or numbers > _LOGITS):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def wide(logits: Tensor) -> Tensor:
    """Logits in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
