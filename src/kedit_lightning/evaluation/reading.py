"""What a model is asked about an example, in as few forward passes as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, EncodedRow
from kedit_lightning.evaluation.answers_cache import AnswersCache, key_of
from kedit_lightning.evaluation.protocol import READING_VERSION, Protocol
from kedit_lightning.metrics import ProbeReading
from kedit_lightning.metrics.functional import (
    exact_match,
    kl_divergence,
    mean_log_prob,
    token_match,
)
from kedit_lightning.requests import Probe

Row = TypeVar("Row")

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

    Rows are told apart by their content, sorted by length and cut into passes, so a reading does
    not depend on how probes are ordered or grouped.

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
                fresh = self._read(list(missing.values()), None)
            self.cache.add(dict(zip(missing, fresh, strict=True)))
        return [self.cache.known[key] for key in keys]

    def readings(
        self, probes: Sequence[Probe], base_readings: Sequence[ProbeReading]
    ) -> list[ProbeReading]:
        """What the model says under the edits that are applied now.

        Args:
            probes: The probes.
            base_readings: What :meth:`base_readings` gave for them.
        """
        if not self.base.edits.active:
            return list(base_readings)
        return self._read(probes, base_readings)

    # ---- putting readings together

    @torch.no_grad()
    def _read(
        self, probes: Sequence[Probe], against: Sequence[ProbeReading] | None
    ) -> list[ProbeReading]:
        """Readings of the model as it stands; ``against`` is ``None`` on the base model itself."""
        texts = self._texts([probe.prompt for probe in probes])
        answers = self._answers(
            [
                (probe.prompt, answer)
                for probe in probes
                for answer in (*probe.answers, *([probe.contrast] if probe.contrast else []))
            ]
        )
        local = [i for i, p in enumerate(probes) if p.kind == "locality"]
        default = self.protocol.scoring == "default"
        along = {
            i: (against[i].get("text") if against is not None else texts.get(probes[i].prompt))
            for i in (local if default else [])
        }
        paths = self._paths([(probes[i], text) for i, text in along.items()], against is not None)
        seen = dict(zip(along, paths, strict=True))
        return [
            self._reading(probe, texts.get(probe.prompt), answers, seen.get(i))
            for i, probe in enumerate(probes)
        ]

    def _reading(
        self,
        probe: Probe,
        text: str | None,
        answers: dict[tuple[str, str], AnswerScore],
        path: PathScore | None,
    ) -> ProbeReading:
        scores = [answers[probe.prompt, answer] for answer in probe.answers]
        first = scores[0] if scores else None
        contrast = answers[probe.prompt, probe.contrast] if probe.contrast else None
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

    def _texts(self, prompts: Sequence[str]) -> dict[str, str]:
        """Free answers by prompt."""
        if not self.protocol.generates:
            return {}
        unique = sorted(set(prompts), key=lambda text: (self.base.encoder.count(text), text))
        texts = self.base.generate(
            unique,
            max_new_tokens=self.protocol.max_new_tokens,
            batch_size=self.protocol.score_batch_size,
            stop_at_sentence=True,
        )
        return dict(zip(unique, texts, strict=True))

    def _answers(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], AnswerScore]:
        """Scores of teacher-forced answers by prompt and answer."""
        rows = {pair: self.base.encode(*pair) for pair in dict.fromkeys(pairs)}
        scores: dict[EncodedRow, AnswerScore] = {}
        for batch in self._batches(list(dict.fromkeys(rows.values())), lambda row: row):
            scores |= zip(batch, self._score_answers(batch), strict=True)
        return {pair: scores[row] for pair, row in rows.items()}

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

    def _paths(self, probes: Sequence[tuple[Probe, str | None]], compare: bool) -> list[PathScore]:
        """What is seen along the base model's continuation of each prompt.

        Without free answers it is the probe's own answer that is followed, or else the position
        behind the prompt.
        """
        rows = [self._path_rows(probe, text, compare) for probe, text in probes]
        scores: dict[tuple[EncodedRow, EncodedRow], PathScore] = {}
        for batch in self._batches(list(dict.fromkeys(rows)), lambda pair: pair[0]):
            scores |= zip(batch, self._score_paths(batch, compare), strict=True)
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
