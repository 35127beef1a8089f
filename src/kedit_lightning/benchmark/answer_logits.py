"""Forward passes along answers, under the edits that rows carry and without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from kedit_lightning.base_models import BaseModel, EncodedRow
from kedit_lightning.base_models.batching import logit_batches
from kedit_lightning.base_models.prefix_states import PrefixStates
from kedit_lightning.base_models.shared_prompts import SharedPrompts
from kedit_lightning.benchmark.free_texts import Carried, Question, carrying
from kedit_lightning.metrics import ForwardPass
from kedit_lightning.metrics.functional import widened

#: Tokens of a row that is no short one, and how many short ones are read for each of these.
_TOKENS, _MORE = 64, 4


class ForcedRow(NamedTuple):
    """A row whose answer tokens are fed to the model."""

    edit: Carried  # the edit that the row carries
    tokens: EncodedRow  # under the edits: prompt edits rewrite prompts
    plain: EncodedRow | None = None  # without edits, where logits are compared with the base model


def parts_of_questions(
    base: BaseModel, asked: Sequence[Question], rows: int
) -> Iterator[list[Question]]:
    """Cut questions, sorted by length, into parts whose prompts are read together.

    Args:
        base: The base model.
        asked: The questions.
        rows: How many make a part if they have 64 tokens; of shorter ones it is more.
    """
    part: list[Question] = []
    for question in asked:
        tokens = (len(part) + 1) * base.encoder.count_prompt(question[1])
        if part and (tokens > rows * _TOKENS or len(part) == rows * _MORE):
            yield part
            part = []
        part.append(question)
    if part:
        yield part


class AnswerLogits:
    """Passes along answers to some questions.

    Args:
        base: The base model.
        prefixes: What prompts begin with under in-context edits.
        shared: Questions whose prompts are read once (``reader.prompts_are_shared``); without any,
            each row is read by itself.
    """

    def __init__(
        self, base: BaseModel, prefixes: PrefixStates, shared: Sequence[Question] = ()
    ) -> None:
        self._base, self._prefixes = base, prefixes
        self._edits = [edit for edit, _, _ in shared]
        self._prompts = [base.encode(prompt) for _, prompt, _ in shared]
        self._questions = {question: number for number, question in enumerate(shared)}
        self._numbers = {
            (edit, row.prompt): number
            for number, (edit, row) in enumerate(zip(self._edits, self._prompts, strict=True))
        }

    def batches(self, rows: Iterable[ForcedRow], size: int) -> Iterator[list[ForcedRow]]:
        """Cut rows into batches of a forward pass: sorted by length, so that padding is short."""

        def order(row: ForcedRow) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
            prompt, answer = row.tokens.prompt, row.tokens.answer
            return len(answer), len(prompt), prompt, answer

        vocabulary = int(self._base.model.config.get_text_config().vocab_size)
        size = max(size, len(self._prompts))  # passes have only what follows the prompts
        return logit_batches(
            sorted(rows, key=order), lambda row: len(row.tokens.answer), vocabulary, size
        )

    def generating(self, asked: Sequence[Question]) -> dict[str, Any]:
        """Options of free generation that continue the prompts of questions."""
        if self.prompts is None:
            return {}
        numbers = [self._questions[question] for question in asked]
        return {"prefix_states": self.prompts.some(numbers)}

    @cached_property
    def prompts(self) -> SharedPrompts | None:
        """The prompts under the edits of their questions."""
        if all(len(row.prompt) < 2 for row in self._prompts):
            return None
        with carrying(self._base, self._edits):
            return SharedPrompts(self._base, self._prompts)

    @cached_property
    def _plain(self) -> SharedPrompts:
        with self._base.edits.suspended():
            return SharedPrompts(self._base, self._prompts)

    def of(self, batch: Sequence[ForcedRow]) -> ForwardPass:
        """A pass along the answers of rows, and one without edits where these are compared."""
        shared, base = self.prompts, self._base
        edited = [row.tokens for row in batch]
        compared = [row.plain for row in batch if row.plain is not None]
        base_logits = base_rows = None
        with carrying(base, [row.edit for row in batch]):
            if shared is not None:
                numbers = [self._numbers[row.edit, row.tokens.prompt] for row in batch]
                rows, options = shared.answer_rows(edited, numbers)
                logits = base.logits_at(rows, rows.answer_columns, **options)
            elif edited == compared:
                rows = base_rows = base.pad(edited)
                logits = base.answer_logits(rows)
            else:
                rows, logits = self._prefixes.answer_logits(edited)
            logits = widened(logits)  # [batch, width, vocab]
            # In passes of the same shape on the same rows, so that no change gives exactly 0.
            if compared and shared is not None:
                with base.edits.suspended():
                    base_rows, options = self._plain.answer_rows(compared, numbers)
                    columns = base_rows.answer_columns
                    base_logits = widened(base.logits_at(base_rows, columns, **options))
            elif compared:
                base_rows = base.pad(compared) if base_rows is None else base_rows
                with base.edits.suspended():
                    base_logits = widened(base.answer_logits(base_rows))
        return ForwardPass(logits, rows.answer_ids, rows.answer_mask, base_logits)
