"""Forward passes along answers, under the edits that rows carry and without."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, EncodedRow
from kedit_lightning.base_models.batching import like_lengths, logit_batches
from kedit_lightning.base_models.generation import greedy_answers
from kedit_lightning.base_models.plain_prompts import PlainPrompts
from kedit_lightning.base_models.prefill import unchanged_blocks
from kedit_lightning.base_models.prefix_states import PrefixStates
from kedit_lightning.base_models.rows import TokenRows, answering, without_last
from kedit_lightning.base_models.shared_prompts import SharedPrompts
from kedit_lightning.benchmark.begun_answers import BegunAnswers
from kedit_lightning.benchmark.free_texts import Carried, Question, carrying
from kedit_lightning.metrics import ForwardPass
from kedit_lightning.metrics.functional import widened

#: Tokens of a row that is no short one, and how many short ones are read for each of these.
_TOKENS, _MORE = 64, 4
#: What one more pass along answers costs, with those that go on from it, in tokens.
OVERHEAD = 100


class ForcedRow(NamedTuple):
    """A row whose answer tokens are fed to the model."""

    edit: Carried  # the edit that the row carries
    tokens: EncodedRow  # under the edits: prompt edits rewrite prompts
    plain: EncodedRow | None = None  # without edits, where logits are compared with the base model


def parts_of_questions(
    base: BaseModel, asked: Sequence[Question], rows: int
) -> Iterator[list[Question]]:
    """Cut questions into parts whose prompts, of about one length, are read together.

    Args:
        base: The base model.
        asked: The questions.
        rows: How many make a part if they have 64 tokens; of shorter ones it is more.
    """
    part: list[Question] = []
    longest = 0
    for question in asked:
        length = base.encoder.count_prompt(question[1])
        longest = max(longest, length)
        if part and ((len(part) + 1) * longest > rows * _TOKENS or len(part) == rows * _MORE):
            yield part
            part, longest = [], length
        part.append(question)
    if part:
        yield part


@dataclass
class OpenAnswer:
    """A free answer that is being found.

    Args:
        key: The edit, and the ids of the prompt.
        ids: Its beginning.
        ended: Whether that is all of it.
        number: The path that has shown the beginning, if there is more to come.
        read: What the pass along that path has read, see :class:`PathLogits`.
    """

    key: tuple[Carried, tuple[int, ...]]
    ids: Sequence[int] = ()
    ended: bool = False
    number: int = 0
    read: tuple[Tensor, Any, int] | None = None


class Path(NamedTuple):
    """What one row of a pass reads, and the rows whose logits it holds.

    The answer of ``tokens`` begins with that of each of ``rows``.
    """

    edit: Carried
    tokens: EncodedRow
    plain: EncodedRow | None  # without edits, where logits are compared
    rows: list[ForcedRow]


class PathLogits(NamedTuple):
    """Logits along the answers of paths, in at least float32."""

    paths: Sequence[Path]
    logits: Tensor  # [paths, width, vocab]
    base_logits: Tensor | None  # the same without edits
    #: Attention mask of all that was read, its cache, and how many columns this pass has added.
    read: tuple[Tensor, Any, int] | None

    def forwards(self) -> Iterator[tuple[list[ForcedRow], ForwardPass]]:
        """The rows on the paths, those of one length together."""
        alike: dict[tuple[int, bool], list[tuple[int, ForcedRow]]] = {}
        for number, path in enumerate(self.paths):
            for row in path.rows:
                key = len(row.tokens.answer), row.plain is not None
                alike.setdefault(key, []).append((number, row))
        for (length, compared), pairs in alike.items():
            rows, device = [row for _, row in pairs], self.logits.device
            at = torch.tensor([number for number, _ in pairs], device=device)
            ids = torch.tensor([row.tokens.answer for row in rows], device=device)
            base = (
                self.base_logits[at, :length] if compared and self.base_logits is not None else None
            )
            mask = torch.ones_like(ids, dtype=torch.bool)
            yield rows, ForwardPass(self.logits[at, :length], ids, mask, base)


class AnswerLogits:
    """Passes along answers to some questions.

    Args:
        base: The base model.
        prefixes: What prompts begin with under in-context edits.
        shared: Questions whose prompts are read once (``reader.prompts_are_shared``); without any,
            each row is read by itself.
        plain: Known caches of the base model without edits, by their prompts; they are added to.
        joined: Whether rows behind one prompt that begin alike are read in one.
    """

    def __init__(
        self,
        base: BaseModel,
        prefixes: PrefixStates,
        shared: Sequence[Question] = (),
        plain: PlainPrompts | None = None,
        joined: bool = False,
    ) -> None:
        self._base, self._prefixes = base, prefixes
        self._joined = joined or bool(shared)
        self._known = PlainPrompts(base) if plain is None else plain
        self._edits = [edit for edit, _, _ in shared]
        self._prompts = [base.encode(prompt) for _, prompt, _ in shared]
        self._questions = {question: number for number, question in enumerate(shared)}
        self._numbers = {
            (edit, row.prompt): number
            for number, (edit, row) in enumerate(zip(self._edits, self._prompts, strict=True))
        }

    def batches(
        self, rows: Iterable[ForcedRow], guesses: Iterable[ForcedRow], size: int
    ) -> Iterator[list[Path]]:
        """Cut what is read into batches of a forward pass, sorted by length to keep padding short.

        Args:
            rows: Rows whose logits are read.
            guesses: Rows that are read as well.
            size: Most rows of a batch, more of short ones and of those behind shared prompts.
        """

        def order(path: Path) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
            prompt, answer = path.tokens.prompt, path.tokens.answer
            return len(answer), len(prompt), prompt, answer

        vocabulary = int(self._base.model.config.get_text_config().vocab_size)
        wanted = set(rows := list(rows))
        paths = sorted(self._paths([*rows, *guesses], wanted), key=order)
        size = max(size, 2 * len(self._prompts))  # passes have only what follows the prompts
        if self._joined and paths and not self._prompts:
            longest = max(len(path.tokens.prompt) + len(path.tokens.answer) for path in paths)
            size = max(size, min(_MORE * size, size * _TOKENS // longest))
        for some in ([p for p in paths if p.plain], [p for p in paths if not p.plain]):
            # All that is read of paths behind shared prompts is about as long as their answers.
            lengths = [max(1, len(path.tokens.answer)) for path in some]
            parts = like_lengths(lengths, OVERHEAD) if self._prompts else [range(len(some))]
            for part in parts:
                own = [some[number] for number in part]
                yield from logit_batches(own, lambda p: len(p.tokens.answer), vocabulary, size)

    def _paths(self, rows: Sequence[ForcedRow], wanted: Collection[ForcedRow]) -> list[Path]:
        """The fewest rows that hold all of some, of which those that are wanted are kept."""
        if not self._joined:
            return [Path(*row, [row]) for row in rows if row in wanted]
        behind: dict[tuple[Carried, EncodedRow], list[ForcedRow]] = {}
        for row in rows:
            behind.setdefault((row.edit, replace(row.tokens, answer=())), []).append(row)
        paths: list[Path] = []
        for own in behind.values():
            last: Path | None = None
            # Behind a row comes at once, in this order, the longest one that begins as it does.
            for row in sorted(own, key=lambda row: row.tokens.answer[:-1], reverse=True):
                fed = row.tokens.answer[:-1]
                if last is None or last.tokens.answer[:-1][: len(fed)] != fed:
                    last = Path(row.edit, row.tokens, None, [])
                    paths.append(last)
                if row in wanted:
                    last.rows.append(row)
        return [path._replace(plain=_compared(path)) for path in paths]

    @cached_property
    def prompts(self) -> SharedPrompts | None:
        """The prompts under the edits of their questions."""
        if all(len(row.prompt) < 2 for row in self._prompts):
            return None
        if not any(self._edits) and not self._base.edits.active:
            return self._known.of(self._prompts)
        with carrying(self._base, self._edits):
            return SharedPrompts(self._base, self._prompts, self._known.known(self._prompts))

    @property
    def _plain(self) -> SharedPrompts:
        with self._base.edits.suspended():
            return self._known.of(self._prompts)

    @property
    def shows_answers(self) -> bool:
        """Whether passes along answers show how free answers begin, and may be gone on from."""
        return self._joined and (not self._prompts or self._prefixes.bears_gaps)

    def generating(self, asked: Sequence[Question]) -> dict[str, Any]:
        """Options of free generation that continue the prompts of questions."""
        if self.prompts is None:
            return {}
        numbers = [self._questions[question] for question in asked]
        return {"prefix_states": self.prompts.some(numbers)}

    def of(self, batch: Sequence[Path]) -> PathLogits:
        """A pass along the answers of paths, and one without edits where these are compared.

        Both have one shape, so that no change gives exactly 0.
        """
        base, prompts, plain_logits, plain = self._base, self.prompts, None, None
        edited = [path.tokens for path in batch]
        compared = [path.plain for path in batch if path.plain is not None]
        with carrying(base, [path.edit for path in batch]):
            if prompts is None:
                return PathLogits(batch, *self._whole(edited, compared), None)
            numbers = [self._numbers[path.edit, path.tokens.prompt] for path in batch]
            blocks = unchanged_blocks(base)
            if compared:
                with base.edits.suspended():
                    plain = self._plain.tails(compared, numbers)
                    rows = plain.rows
                    with plain.noting(blocks):
                        plain_logits = base.logits_at(rows, rows.answer_columns, **plain.options)
                    plain_logits = widened(plain_logits)
            tails = prompts.tails(edited, numbers)
            rows = tails.rows
            with tails.above(blocks, plain):
                logits = widened(base.logits_at(rows, rows.answer_columns, **tails.options))
        width = rows.inputs["input_ids"].shape[1]
        return PathLogits(batch, logits, plain_logits, (rows.attention_mask, tails.cache, width))

    def _whole(
        self, edited: Sequence[EncodedRow], compared: Sequence[EncodedRow]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of whole rows, with and without edits."""
        base, base_rows = self._base, None
        if self._joined or edited == compared:
            rows = base_rows = self._padded(edited)
            logits = widened(base.answer_logits(rows))
        else:
            logits = widened(self._prefixes.answer_logits(edited)[1])
        if not compared:
            return logits, None
        base_rows = base.pad(compared) if base_rows is None else base_rows
        with base.edits.suspended():
            return logits, widened(base.answer_logits(base_rows))

    def _padded(self, encoded: Sequence[EncodedRow]) -> TokenRows:
        """Whole rows; joined ones without their last tokens, which predict nothing."""
        if not self._joined:
            return self._base.pad(encoded)
        padded = self._base.pad(without_last(encoded))
        return answering(padded, encoded, self._base.pad_id)

    def shown(
        self, read: PathLogits, open_answers: Mapping[Question, OpenAnswer], begun: BegunAnswers
    ) -> None:
        """Take from a pass what it shows of free answers, where it is more than is known."""
        asked = {answer.key: answer for answer in open_answers.values()}
        predicted = read.logits.argmax(-1).tolist()
        for number, (path, own) in enumerate(zip(read.paths, predicted, strict=True)):
            answer = asked.get((path.edit, path.tokens.prompt))
            if answer is None:
                continue
            fed = path.tokens.answer[:-1]
            ids = begun.begun(len(path.tokens.prompt), fed, own[: len(fed) + 1])
            if len(ids) > len(answer.ids):
                ended = begun.ended(len(path.tokens.prompt), ids)
                answer.ids, answer.read = ids, None if ended else read.read
                answer.ended, answer.number = ended, number

    def finished(
        self, open_answers: Mapping[Question, OpenAnswer], begun: BegunAnswers
    ) -> dict[Question, str]:
        """Free answers, those that have not ended continued behind what was read of them.

        Those whose paths were read whole are left out.
        """
        together: dict[int, list[OpenAnswer]] = {}
        for answer in open_answers.values():
            if answer.read is not None:
                together.setdefault(id(answer.read[1]), []).append(answer)
        for some in together.values():
            self._go_on(some, begun)
        return {q: begun.text(a.ids) for q, a in open_answers.items() if a.ended}

    def _go_on(self, some: Sequence[OpenAnswer], begun: BegunAnswers) -> None:
        """Continue answers that are behind one cache."""
        assert some[0].read is not None
        mask, cache, width = some[0].read
        index = torch.tensor([answer.number for answer in some], device=mask.device)
        lengths = torch.tensor([[len(answer.ids)] for answer in some], device=mask.device)
        # What was fed of other tokens than those of the answer is not there.
        right = torch.arange(width, device=mask.device) < lengths
        mask = torch.cat([mask[index, :-width], right.to(mask)], dim=1)
        cache.batch_select_indices(index)
        prompts = [len(answer.key[1]) for answer in some]

        def ended(row: int, ids: Sequence[int]) -> bool:
            return begun.ended(prompts[row], ids)

        def carried(rows: Sequence[int]) -> AbstractContextManager[None]:
            return carrying(self._base, [some[row].key[0] for row in rows])

        ids = [answer.ids for answer in some]
        found = greedy_answers(self._base, ids, (mask, cache), ended, carried)
        for answer, whole in zip(some, found, strict=True):
            answer.ids, answer.ended, answer.read = whole, True, None


def _compared(path: Path) -> EncodedRow | None:
    """The row without edits beside a path, where one of its rows is compared."""
    plain = next((row.plain for row in path.rows if row.plain is not None), None)
    return None if plain is None else replace(plain, answer=path.tokens.answer)
