"""Lengths of the rows that a run will read, found before anything is computed.

A row that does not fit would end a run at the record it belongs to, perhaps after hours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.rows import RowEncoder, join_text
from kedit_lightning.chat_turns import put_before
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.image_reference import references
from kedit_lightning.requests import EditExample, EditRequest, Probe

#: Tokens by which a prompt and its answer, tokenised as one text, may differ from their row.
_MARGIN = 16
#: Texts that are tokenised at once.
_TEXTS = 1000


@dataclass(frozen=True)
class Window:
    """What a model takes in one row.

    Args:
        model: How messages name the model.
        encoder: Its tokens.
        tokens: Its longest row, prompt and answer together.
    """

    model: str
    encoder: RowEncoder
    tokens: int

    @classmethod
    def of(cls, base: BaseModel) -> Window:
        """The window of a base model."""
        return cls(f"base model '{base.name}'", base.encoder, base.max_tokens)


class RowText(NamedTuple):
    """A row: what it is, in messages, its prompt, its answer if it has one, and its pictures."""

    what: str
    prompt: str
    answer: str | None = None
    images: tuple[str, ...] = ()


def request_rows(request: EditRequest) -> list[RowText]:
    """The rows of a request: its prompt with the new answer, and with the old one if given."""
    images = references(request.image)
    rows = [RowText("its prompt with target_new", request.prompt, request.target_new, images)]
    if request.target_old is not None:
        old = RowText("its prompt with target_old", request.prompt, request.target_old, images)
        rows.append(old)
    return rows


def example_rows(example: EditExample, before: str = "") -> list[RowText]:
    """The rows of an example: its requests, and its probes behind the text ``before`` them."""
    rows = [row for request in example.requests for row in request_rows(request)]
    return rows + [row for probe in example.probes for row in probe_rows(probe, before)]


def probe_rows(probe: Probe, before: str = "") -> list[RowText]:
    """The rows of a probe: its question with each answer, behind the text ``before`` it.

    A question without an answer is asked freely.
    """
    answers: list[str | None] = [*probe.answers, *([probe.contrast] if probe.contrast else [])]
    answers += probe.task.against if probe.task else ()
    what, prompt = f"its {probe.kind} probe", put_before(before, probe.prompt)
    images = references(probe.image)
    return [RowText(what, prompt, answer, images) for answer in answers or [None]]


def free_rows(example: EditExample) -> list[RowText]:
    """The questions about an example, without their answers."""
    asked: list[EditRequest | Probe] = [*example.requests, *example.probes]
    return [RowText("a question", q.prompt, None, references(q.image)) for q in asked]


def token_counts(window: Window, rows: Iterable[RowText]) -> dict[RowText, int]:
    """Number of tokens of each row, with room for one more where it has no answer.

    Pictures count by their size, for which files are not decoded.  Numbers near the window's
    size and beyond are exact, others may be off by a few.
    """
    encoder, counts = window.encoder, dict[RowText, int]()
    around = len(encoder.encode("a").prompt) + _MARGIN
    for part in chunks(list(dict.fromkeys(rows)), _TEXTS):
        texts = [
            row.prompt if row.answer is None else join_text(row.prompt, row.answer) for row in part
        ]
        ids = encoder.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for row, tokens in zip(part, ids, strict=True):
            seen = encoder.images.usual_count(row.images) if encoder.images else 0
            counts[row] = len(tokens) + seen
            if counts[row] + around > window.tokens:
                images = row.images if encoder.images else ()
                exact = encoder.encode(row.prompt, row.answer, None, images)
                counts[row] = len(exact.prompt) + (len(exact.answer) or 1)
    return counts


def too_long(
    window: Window, examples: Sequence[EditExample], rows: Sequence[Sequence[RowText]]
) -> dict[str, str]:
    """The examples with a row that does not fit, by id, with a clause about the longest such row.

    Args:
        window: The model that reads the rows.
        examples: The examples.
        rows: The rows of each.
    """
    counts = token_counts(window, (row for own in rows for row in own))
    clauses = {}
    for example, own in zip(examples, rows, strict=True):
        longest = max(own, key=lambda row: counts[row])
        if counts[longest] > window.tokens:
            clauses[example.id] = (
                f"{longest.what} takes {counts[longest]} tokens, and {window.model} takes at most "
                f"{window.tokens}"
            )
    return clauses


def too_long_together(
    window: Window,
    examples: Sequence[EditExample],
    stated: Sequence[Sequence[RowText]],
    asked: Sequence[Sequence[RowText]],
) -> dict[str, str]:
    """The examples that do not fit with those before them, where any fact may meet any question.

    Args:
        window: The model that reads a fact and a question in one row.
        examples: The examples; those named here are left out for the ones behind them.
        stated: The facts of each.
        asked: The questions of each.
    """
    counts = token_counts(window, (row for own in (*stated, *asked) for row in own))
    clauses, longest = dict[str, str](), (0, 0)
    for example, *rows in zip(examples, stated, asked, strict=True):
        fact, question = (max(counts[row] for row in own) for own in rows)
        together = max(longest[0], fact), max(longest[1], question)
        if sum(together) <= window.tokens:
            longest = together
            continue
        clauses[example.id] = (
            f"a fact and a question take {sum(together)} tokens together, and {window.model} takes "
            f"at most {window.tokens} for them"
        )
    return clauses


def refuse_long(
    requests: Sequence[EditRequest],
    too_long: Callable[[Sequence[EditExample]], Mapping[str, str]],
) -> None:
    """Refuse requests whose own questions could not be asked under their edit.

    Raises:
        InvalidRequestError: One is too long; the message names it.
    """
    for request in requests:
        for reason in too_long([EditExample.from_request(request, "")]).values():
            raise InvalidRequestError(
                f"{request.label} is too long: {reason}, with the fact stated before the question; "
                "shorten its prompt or target_new"
            )
