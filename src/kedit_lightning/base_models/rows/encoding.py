"""From text to token ids.

Prompt and answer are tokenised together, and cut at the character where the answer begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kedit_lightning.base_models.rows.image import ImageEncoder
from kedit_lightning.base_models.rows.position import (
    is_unspaced,
    last_place,
    shared_length,
    token_span,
)
from kedit_lightning.errors import InvalidRequestError, UnsupportedUseError


def join_text(prompt: str, answer: str) -> str:
    """Put an answer behind a prompt with one space between, none in scripts without spaces.

    >>> join_text("The capital is ", " Rome")
    'The capital is Rome'
    >>> join_text("首都是", "罗马")
    '首都是罗马'
    """
    prompt, answer = prompt.rstrip(), answer.lstrip()
    glued = any(is_unspaced(c) for c in prompt[-1:] + answer[:1])
    return prompt + ("" if glued else " ") + answer


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row.

    Args:
        prompt: Ids of the prompt, beginning-of-sequence token included.
        answer: Ids of the answer; empty when there is none.
        subject_end: Index in ``prompt`` of the subject's last token; ``-1`` without a subject.
        subject_start: Index of its first token; ``-1`` without a subject.
        images: Paths or URLs of the pictures whose placeholder ids the prompt holds, in order.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    subject_end: int = -1
    subject_start: int = -1
    images: tuple[str, ...] = ()


class RowEncoder:
    """Tokenises prompts and answers with one tokenizer.

    Args:
        tokenizer: The tokenizer of the base model.
        chat: Put each prompt into the user turn of the tokenizer's chat template.
        images: Encoder of the pictures that prompts are about, where the base model sees.
    """

    def __init__(
        self, tokenizer: Any, chat: bool = False, images: ImageEncoder | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.images = images
        plain, special = self._ids("a"), list(tokenizer("a")["input_ids"])
        #: Ids the tokenizer puts before a text by itself (a beginning-of-sequence token, or none),
        #: and behind it, which encoders need and decoders must not see.
        self.prefix, self.suffix = tuple[int, ...](), tuple[int, ...]()
        for start in range(len(special) - len(plain) + 1):
            if special[start : start + len(plain)] == plain:
                end = start + len(plain)
                self.prefix, self.suffix = tuple(special[:start]), tuple(special[end:])
                break

    def of(self, tokenizer: Any) -> RowEncoder:
        """An encoder for another tokenizer, without a chat template."""
        return RowEncoder(tokenizer)

    def _ids(self, text: str) -> list[int]:
        # Callers compare the length with the model's own; a warning of transformers adds nothing.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]

    def count(self, text: str, images: Sequence[str] = ()) -> int:
        """Number of tokens of a prompt with its pictures."""
        pictures = self.images.count(images) if self.images else 0
        return len(self.prefix) + len(self._ids(text)) + pictures

    def wrap(self, prompt: str) -> str:
        """The prompt inside the chat template, or the prompt itself."""
        if not self.chat:
            return prompt
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return text

    def encode(
        self,
        prompt: str,
        answer: str | None = None,
        subject: str | None = None,
        images: Sequence[str] = (),
    ) -> EncodedRow:
        """Tokenise a prompt, with its answer and the span of its subject where given.

        Args:
            prompt: The prompt, after prompt edits have rewritten it.
            answer: Text that follows.
            subject: Part of the prompt; its last occurrence as a whole word counts.
            images: Paths or URLs of the pictures that the prompt is about.

        Raises:
            InvalidRequestError: The subject is not part of the prompt, or a text is empty.
            UnsupportedUseError: There are pictures, and the base model has no processor.
        """
        if images:
            return self._with_images(prompt, answer, subject, images)
        text = self.wrap(prompt)
        if not self.chat:
            text = text.rstrip()
        ids = self._ids(text)
        first = text[: len(text) - len(text.lstrip())]
        prefix = self.prefix
        bos = getattr(self.tokenizer, "bos_token", None)
        if self.chat and bos and text.startswith(bos, len(first)):
            prefix = ()  # the template has put it already
        if not (prefix or ids):
            raise InvalidRequestError("a prompt is empty; give at least one word")
        start = end = -1
        if subject is not None:
            start, end = (len(prefix) + i for i in self._subject_span(prompt, text, subject))
        answer_ids = () if answer is None else tuple(self._answer(text, ids, answer))
        if answer is not None and not (answer.strip() and answer_ids):
            raise InvalidRequestError(f"the answer {answer!r} has no token; give at least one word")
        return EncodedRow((*prefix, *ids), answer_ids, end, start)

    def _with_images(
        self, prompt: str, answer: str | None, subject: str | None, images: Sequence[str]
    ) -> EncodedRow:
        if self.images is None:
            raise UnsupportedUseError(
                f"prompt {prompt[:60]!r} has an image, and the base model no processor; give one: "
                "BaseModel(model, tokenizer, processor=...)"
            )
        row = self.encode(self.images.prompt(prompt, images), answer, subject)
        ids, index = self.images.expand(row.prompt, images)
        start, end = (index[i] if i >= 0 else -1 for i in (row.subject_start, row.subject_end))
        return replace(
            row, prompt=tuple(ids), subject_start=start, subject_end=end, images=tuple(images)
        )

    def _answer(self, text: str, ids: list[int], answer: str) -> list[int]:
        joined = text + answer.lstrip() if self.chat else join_text(text, answer)
        encoded = self._offsets(joined)
        if encoded is None:
            all_ids, cut = self._ids(joined), len(ids)
        else:
            all_ids, offsets = encoded
            cut = next((i for i, (_, end) in enumerate(offsets) if end > len(text)), len(offsets))
        if all_ids[:cut] == ids and all_ids[cut:]:
            return all_ids[cut:]
        # The tokenizer merges across the border: take the answer's ids behind a neutral word.
        anchor = "x"
        joined = anchor + answer.lstrip() if self.chat else join_text(anchor, answer)
        alone, behind = self._ids(anchor), self._ids(joined)
        rest = behind[len(alone) :] if behind[: len(alone)] == alone else []
        return rest or self._ids(answer)

    def _subject_span(self, prompt: str, text: str, subject: str) -> tuple[int, int]:
        """First and last token that hold a part of the subject, counted without the prefix."""
        # Outside the prompt stands what a chat template adds, which may hold the subject too.
        prompt, subject = prompt.strip(), subject.strip()
        at = last_place(prompt, subject) if subject else -1
        if at < 0 or prompt not in text:
            raise InvalidRequestError(f"subject {subject!r} does not occur in prompt {prompt!r}")
        begin = text.rfind(prompt) + at
        end = begin + len(subject)
        encoded = self._offsets(text)
        if encoded is not None:
            return token_span(encoded[1], begin, end)
        whole, before, part = (self._ids(cut) for cut in (text, text[:begin], text[:end]))
        # Where a token goes on past a cut, the cut text has other tokens from there on.
        last = min(shared_length(whole, part), len(part) - 1)
        return min(shared_length(whole, before), last), last
