"""From text to token ids.

Prompt and answer are tokenised together, and cut at the character where the answer begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from kedit_lightning.base_models.rows.image import ImageEncoder
from kedit_lightning.base_models.rows.position import (
    ends_open,
    is_unspaced,
    last_place,
    shared_length,
    token_span,
)
from kedit_lightning.chat_turns import messages_in, passage_with
from kedit_lightning.errors import InvalidRequestError, UnsupportedUseError


def _place_in(ids: tuple[int, ...], tail: tuple[int, ...], subject: str) -> int:
    """Index at which the last tokens of a prompt stand among those that a processor made of it."""
    for at in range(len(ids) - len(tail), -1, -1):
        if ids[at : at + len(tail)] == tail:
            return at
    raise InvalidRequestError(
        f"subject {subject!r} is not found behind the pictures of its prompt; put image tokens "
        "before the subject, or leave them out"
    )


def join_text(prompt: str, answer: str) -> str:
    r"""Put an answer behind a prompt with one space between.

    There is none in scripts without spaces, behind a line break, and behind an opening quotation
    mark or bracket.

    >>> join_text("The capital is ", " Rome"), join_text("Question:\n", "Rome")
    ('The capital is Rome', 'Question:\nRome')
    >>> join_text("首都是", "罗马"), join_text('They say "', "Rome")
    ('首都是罗马', 'They say "Rome')
    """
    prompt, answer = prompt.rstrip(" "), answer.lstrip()
    glued = ends_open(prompt) or any(is_unspaced(c) for c in prompt[-1:] + answer[:1])
    return prompt + ("" if glued else " ") + answer


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row.

    Args:
        prompt: Ids of the prompt, beginning-of-sequence token included.
        answer: Ids of the answer; empty when there is none.
        subject_end: Index in ``prompt`` of the subject's last token; ``-1`` without a subject.
        subject_start: Index of its first token; ``-1`` without a subject.
        images: References to the pictures whose placeholder ids the prompt holds, in order.
        types: Other inputs with a value for each token of such a prompt, by name.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    subject_end: int = -1
    subject_start: int = -1
    images: tuple[str, ...] = ()
    types: tuple[tuple[str, tuple[int, ...]], ...] = ()


class _Rendered(NamedTuple):
    """What the model reads as a prompt.

    ``in_template``: the chat template wrote it, and begins it as it should; ``ended``: the template
    also wrote what stands before an answer, so that no space follows.
    """

    text: str
    in_template: bool = False
    ended: bool = False


#: Ids of a text, and where each begins and ends, which slow tokenizers do not say.
_Tokens: TypeAlias = tuple[tuple[int, ...], list[tuple[int, int]] | None]
#: Texts whose tokens are remembered.
_TEXTS = 4096


class RowEncoder:
    """Tokenises prompts and answers with one tokenizer.

    Args:
        tokenizer: The tokenizer of the base model.
        chat: Put each prompt into the user turn of the tokenizer's chat template; prompts that are
            messages always go into it.
        images: Encoder of the pictures that prompts are about, where the base model sees.
    """

    def __init__(
        self, tokenizer: Any, chat: bool = False, images: ImageEncoder | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.images = images
        self._known: dict[tuple[int, str], _Tokens] = {}
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
        return list(self._tokens(text)[0])

    def _offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        ids, offsets = self._tokens(text)
        return None if offsets is None else (list(ids), offsets)

    def _tokens(self, text: str) -> _Tokens:
        """Ids of a text and the characters of each; the same text is asked for again and again."""
        key, fast = (len(self.tokenizer), text), getattr(self.tokenizer, "is_fast", False)
        known = self._known.get(key)
        if known is None:
            # Callers compare the length with the model's own; a warning of transformers adds
            # nothing.
            options = {"return_offsets_mapping": True} if fast else {}
            encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, **options)
            offsets = [tuple(pair) for pair in encoded["offset_mapping"]] if fast else None
            if len(self._known) >= _TEXTS:
                self._known.clear()
            known = self._known[key] = tuple(encoded["input_ids"]), offsets
        return known

    def count(self, text: str, images: Sequence[str] = ()) -> int:
        """Number of tokens of a text, begun as a prompt and outside the chat template."""
        pictures = self.images.count(images) if self.images else 0
        return len(self.prefix) + len(self._ids(text)) + pictures

    def count_prompt(self, prompt: str, images: Sequence[str] = ()) -> int:
        """Number of tokens of a prompt with its pictures, inside the chat template where it is."""
        pictures = self.images.count(images) if self.images else 0
        rendered = self._render(prompt)
        ids = self._ids(rendered.text)
        return len(self._start(rendered, ids)) + len(ids) + pictures

    def _render(self, prompt: str) -> _Rendered:
        """The text that the model reads: the prompt itself, or its turns in the chat template."""
        messages = messages_in(prompt)
        if messages is None and not self.chat:
            return _Rendered(prompt.rstrip(" "))
        turns = [dict(m) for m in messages or ({"role": "user", "content": prompt},)]
        # A turn of the assistant that comes last is the beginning of its answer.
        begun = turns[-1]["role"] == "assistant"
        if not getattr(self.tokenizer, "chat_template", None):
            raise UnsupportedUseError(
                f"prompt {turns[-1]['content'][:60]!r} is a chat, and the tokenizer has no chat "
                "template; set tokenizer.chat_template, or give prompts as plain text"
            )
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
            )
        except Exception as error:  # templates refuse turns with errors of many kinds
            roles = ", ".join(turn["role"] for turn in turns)
            raise InvalidRequestError(
                f"the tokenizer's chat template refuses the turns of prompt "
                f"{turns[-1]['content'][:60]!r} ({roles}): {error}"
            ) from error
        return _Rendered(text.rstrip(" ") if begun else text, in_template=True, ended=not begun)

    def _start(self, rendered: _Rendered, ids: Sequence[int]) -> tuple[int, ...]:
        """Ids to put before those of a prompt; none where template or text have begun it."""
        begun = rendered.in_template or tuple(ids[: len(self.prefix)]) == self.prefix
        return () if begun else self.prefix

    def text(self, text: str) -> EncodedRow:
        """Tokenise a text of a corpus: no turns, no template, no answer."""
        rendered = _Rendered(text.rstrip())
        ids = self._ids(rendered.text)
        return EncodedRow((*self._start(rendered, ids), *ids), ())

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
            images: References to the pictures that the prompt is about.

        Raises:
            InvalidRequestError: The subject is not part of the prompt, or a text is empty.
            UnsupportedUseError: There are pictures, and the base model has no processor.
        """
        if images:
            return self._with_images(prompt, answer, subject, images)
        rendered = self._render(prompt)
        ids = self._ids(rendered.text)
        prefix = self._start(rendered, ids)
        if not (prefix or rendered.text.strip()):
            raise InvalidRequestError("a prompt is empty; give at least one word")
        start = end = -1
        if subject is not None:
            span = self._subject_span(passage_with(prompt, subject), rendered.text, subject)
            start, end = (len(prefix) + i for i in span)
        answer_ids = () if answer is None else tuple(self._answer(rendered, ids, answer))
        if answer is not None and not (answer.strip() and answer_ids):
            raise InvalidRequestError(f"the answer {answer!r} has no token; give at least one word")
        return EncodedRow((*prefix, *ids), answer_ids, end, start)

    def check_ids(self, row: EncodedRow, entries: int, model: str) -> None:
        """Check that a model has an embedding for each token; pictures have ids of their own.

        Args:
            row: The row.
            entries: Number of tokens that have an embedding.
            model: Name of the model.

        Raises:
            InvalidRequestError: A token has none; on a GPU it would end the process.
        """
        last = 0 if row.images else max((*row.prompt, *row.answer), default=0)
        if last >= entries:
            raise InvalidRequestError(
                f"prompt {self.tokenizer.decode(row.prompt)[:60]!r}, with its answer, holds token "
                f"{self.tokenizer.convert_ids_to_tokens(last)!r} with id {last}, and base model "
                f"'{model}' has embeddings of {entries} tokens; leave it out, or call "
                "resize_token_embeddings and train the new rows"
            )

    def _with_images(
        self, prompt: str, answer: str | None, subject: str | None, images: Sequence[str]
    ) -> EncodedRow:
        if self.images is None:
            raise UnsupportedUseError(
                f"prompt {prompt[:60]!r} has an image, and the base model no processor that makes "
                "tokens of it; take a vision-language model (--model.base_model), or leave images "
                "out. In Python one that is loaded already is given its own with "
                "BaseModel(model, tokenizer, processor=...)"
            )
        shown = self.images.prompt(prompt, images)
        row, rendered = self.encode(shown, answer, subject), self._render(shown)
        seen = self.images.encode(rendered.text, tuple(images), not rendered.in_template)
        ids = seen.ids
        if self.suffix and ids[-len(self.suffix) :] == self.suffix:
            ids = ids[: -len(self.suffix)]
        if answer is not None and not rendered.text.endswith("\n"):
            # PaliGemma's processor ends prompts with a line break.
            end = self.tokenizer.decode(ids[-1:])
            if end.endswith("\n"):
                ended = rendered._replace(text=rendered.text + "\n")
                row = replace(row, answer=tuple(self._answer(ended, self._ids(ended.text), answer)))
        start = end = -1
        if row.subject_end >= 0:
            start = _place_in(ids, row.prompt[row.subject_start :], subject or "")
            end = start + row.subject_end - row.subject_start
        types = tuple((name, values[: len(ids)]) for name, values in seen.types)
        return EncodedRow(ids, row.answer, end, start, tuple(images), types)

    def _answer(self, rendered: _Rendered, ids: list[int], answer: str) -> list[int]:
        text = rendered.text
        joined = text + answer.lstrip() if rendered.ended else join_text(text, answer)
        encoded = self._offsets(joined)
        if encoded is None:
            all_ids, cut = self._ids(joined), len(ids)
        else:
            all_ids, offsets = encoded
            cut = next((i for i, (_, end) in enumerate(offsets) if end > len(text)), len(offsets))
        if all_ids[:cut] == ids and all_ids[cut:]:
            return all_ids[cut:]
        # The tokenizer merges across the border: take the answer's ids behind a neutral word, or
        # where no space is between, behind the prompt's last character.
        follows = joined[len(text) :]
        for anchor in ("x",) if follows[:1] == " " else (text[-1:], "x"):
            alone, behind = self._ids(anchor), self._ids(anchor + follows)
            if len(behind) > len(alone) and behind[: len(alone)] == alone:
                return behind[len(alone) :]
        return self._ids(answer)

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
