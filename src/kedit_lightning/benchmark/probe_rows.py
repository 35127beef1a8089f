"""The rows that are read of a probe, by the source of what is measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import TypeAlias

from kedit_lightning.base_models import BaseModel, EncodedRow
from kedit_lightning.benchmark.answer_logits import ForcedRow
from kedit_lightning.benchmark.free_texts import Carried
from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.benchmark.row_logits import probe_row
from kedit_lightning.image_reference import references
from kedit_lightning.metrics.measurement import Source
from kedit_lightning.requests import Probe

#: Rows of a probe, by the source of measurements.
Rows: TypeAlias = dict[Source, list[ForcedRow]]


class ProbeRows:
    """Makes the rows of probes.

    Args:
        base: The base model.
        protocol: How long continuations may be.
    """

    def __init__(self, base: BaseModel, protocol: Protocol) -> None:
        self.base, self.protocol = base, protocol

    def along_answers(
        self,
        edit: Carried,
        probe: Probe,
        sources: Collection[Source],
        compare: bool,
        encode: Callable[..., EncodedRow],
    ) -> Rows:
        """Rows of a probe by source, without the continuation."""

        def forced(answers: Iterable[str]) -> list[ForcedRow]:
            rows = (encode(probe.prompt, answer, image=probe.image) for answer in answers)
            return [ForcedRow(edit, row) for row in rows]

        accepted = forced(probe.answers)
        contrast = [probe.contrast] if probe.contrast else []
        against = probe.task.against if probe.task and "against" in sources else ()
        return {
            "answer": accepted[:1],
            "answers": accepted,
            "contrast": forced(contrast),
            "against": forced(against),
            "row": [self._row(edit, probe, compare)] if "row" in sources else [],
        }

    def _row(self, edit: Carried, probe: Probe, compare: bool) -> ForcedRow:
        """The row whose logits are all read, and the unedited one where they are compared."""
        row = probe_row(self.base, probe)
        with self.base.edits.suspended():
            return ForcedRow(edit, row, probe_row(self.base, probe) if compare else None)

    def continuation(
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
