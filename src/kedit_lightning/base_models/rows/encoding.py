"""From text to rows of tokens: the one place that joins, aligns and pads.

Prompt and answer are tokenised together and cut at the character where the answer begins, the
beginning-of-sequence token is put once, the subject is found by character offsets, and position ids
follow the attention mask.  So padding side, batch size and order of rows never change a result.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.errors import InvalidRequestError

PaddingSide: TypeAlias = Literal["left", "right"]

#: Scripts that put no space between words: Thai and Lao, Burmese, Khmer, kana and Han with their
#: punctuation, and full-width forms.
_UNSPACED = (
    ("\u0e00", "\u0eff"),
    ("\u1000", "\u109f"),
    ("\u1780", "\u17ff"),
    ("\u3000", "\u312f"),
    ("\u31f0", "\u9fff"),
    ("\uf900", "\ufaff"),
    ("\uff00", "\uff9f"),
    ("\U00020000", "\U0003ffff"),
)


def _is_unspaced(character: str) -> bool:
    return any(start <= character <= end for start, end in _UNSPACED)


def _last_place(text: str, part: str) -> int:
    """Where a part last stands in a text; as a whole word if it does anywhere, ``-1`` if nowhere.

    >>> _last_place("Art is shown in Arthur's hall", "Art"), _last_place("Kraków", "Kra")
    (0, 0)
    """

    def touches(left: str, right: str) -> bool:
        return all(c.isalnum() and not _is_unspaced(c) for c in (left, right))

    places = [match.start() for match in re.finditer(f"(?={re.escape(part)})", text)]
    padded = f" {text} "
    whole = [
        at
        for at in places
        if not touches(padded[at], part[0]) and not touches(part[-1], padded[at + len(part) + 1])
    ]
    return (whole or places or [-1])[-1]


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two texts begin with together."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def join_text(prompt: str, answer: str) -> str:
    """Put an answer behind a prompt with one space between, none in scripts without spaces.

    >>> join_text("The capital is ", " Rome")
    'The capital is Rome'
    >>> join_text("首都是", "罗马")
    '首都是罗马'
    """
    prompt, answer = prompt.rstrip(), answer.lstrip()
    glued = any(_is_unspaced(c) for c in prompt[-1:] + answer[:1])
    return prompt + ("" if glued else " ") + answer


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row.

    Args:
        prompt: Ids of the prompt, beginning-of-sequence token included.
        answer: Ids of the answer; empty when there is none.
        subject_end: Index in ``prompt`` of the subject's last token; ``-1`` without a subject.
        subject_start: Index of its first token; ``-1`` without a subject.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    subject_end: int = -1
    subject_start: int = -1


class RowEncoder:
    """Turns prompts and answers into ids with one tokenizer.

    Args:
        tokenizer: The tokenizer of the base model.
        chat: Put each prompt into the user turn of the tokenizer's chat template.
    """

    def __init__(self, tokenizer: Any, chat: bool = False) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        special = tokenizer("a")["input_ids"]
        #: Ids the tokenizer puts before a text by itself (a beginning-of-sequence token, or none).
        self.prefix: tuple[int, ...] = ()
        #: Ids it puts behind, which encoders need and decoders must not see.
        self.suffix: tuple[int, ...] = ()
        for start in range(len(special) - len(plain) + 1):
            if special[start : start + len(plain)] == plain:
                self.prefix = tuple(special[:start])
                self.suffix = tuple(special[start + len(plain) :])
                break

    def of(self, tokenizer: Any) -> RowEncoder:
        """One that reads with another tokenizer, outside of any chat."""
        return RowEncoder(tokenizer)

    def _ids(self, text: str) -> list[int]:
        # Whoever asks compares the length with the model's own; transformers need not remark on it.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]

    def count(self, text: str) -> int:
        """How many tokens a prompt takes."""
        return len(self.prefix) + len(self._ids(text))

    def wrap(self, prompt: str) -> str:
        """The prompt inside the chat template, or the prompt itself."""
        if not self.chat:
            return prompt
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return text

    def encode(
        self, prompt: str, answer: str | None = None, subject: str | None = None
    ) -> EncodedRow:
        """Tokenise a prompt, with its answer and the place of its subject where given.

        Args:
            prompt: The prompt, as edits of the context have left it.
            answer: Text that follows.
            subject: Part of the prompt; its last occurrence as a whole word counts.

        Raises:
            InvalidRequestError: The subject is not part of the prompt, or a text is empty.
        """
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

    def _answer(self, text: str, ids: list[int], answer: str) -> list[int]:
        joined = text + answer.lstrip() if self.chat else join_text(text, answer)
        found = self._offsets(joined)
        if found is None:
            all_ids, cut = self._ids(joined), len(ids)
        else:
            all_ids, offsets = found
            beyond = (i for i, (_, end) in enumerate(offsets) if end > len(text))
            cut = next(beyond, len(offsets))
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
        at = _last_place(prompt, subject) if subject else -1
        if at < 0 or prompt not in text:
            raise InvalidRequestError(
                f"the subject {subject!r} does not occur in prompt {prompt!r}"
            )
        begin = text.rfind(prompt) + at
        end = begin + len(subject)
        found = self._offsets(text)
        if found is None:
            whole, before, part = (self._ids(cut) for cut in (text, text[:begin], text[:end]))
            # Where a token goes on past a cut, the cut text has other tokens from there on.
            last = min(_shared(whole, part), len(part) - 1)
            return min(_shared(whole, before), last), last
        tokens = [(i, *pair) for i, pair in enumerate(found[1]) if pair[0] < pair[1]]
        last = max(i for i, start, _ in tokens if start < end)
        return next((i for i, _, stop in tokens if stop > begin), last), last


@dataclass(frozen=True)
class TokenRows:
    """Padded rows, ready for a forward pass.

    Args:
        inputs: What the model takes: ids, attention mask, and position ids or decoder ids where it
            knows them. Shape ``[batch, tokens]`` each.
        prompt_end: Column of each row's last prompt token. Shape ``[batch]``.
        subject_end: Column of each row's last subject token, ``-1`` without one. Shape ``[batch]``.
        answer_ids: Ids of the answers, padded on the right. Shape ``[batch, width]``.
        answer_mask: Where ``answer_ids`` is no padding. Shape ``[batch, width]``.
        answer_columns: Column whose logits predict each answer token. Shape ``[batch, width]``.
    """

    inputs: dict[str, Tensor]
    prompt_end: Tensor
    subject_end: Tensor
    answer_ids: Tensor
    answer_mask: Tensor
    answer_columns: Tensor

    def __len__(self) -> int:
        return len(self.prompt_end)

    @property
    def attention_mask(self) -> Tensor:
        """Where tokens are no padding. Shape ``[batch, tokens]``."""
        return self.inputs["attention_mask"]

    def select(self, index: Tensor) -> TokenRows:
        """Some of the rows, by number. Shape of ``index``: ``[n]``."""
        rest = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "inputs"}
        return TokenRows({name: tensor[index] for name, tensor in self.inputs.items()}, **rest)


def _pad(
    rows: Sequence[Sequence[int]], fill: int, side: PaddingSide
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and the column of each row's first token."""
    width = max(1, *(len(row) for row in rows)) if rows else 1
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    first = torch.zeros(len(rows), dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, start : start + len(row)] = 1
        first[i] = start
    return ids, mask, first


def positions(mask: Tensor) -> Tensor:
    """Position of each token among the attended ones; 0 on padding. ``[batch, tokens]``."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def pad_rows(
    rows: Sequence[EncodedRow],
    pad_id: int,
    side: PaddingSide,
    takes_positions: bool,
    device: torch.device,
) -> TokenRows:
    """Align and pad rows of a decoder: prompt and answer in one sequence.

    Args:
        rows: The rows.
        pad_id: Id put where there is no token; masked, so any valid id serves.
        side: Where padding goes.
        takes_positions: Whether the model's ``forward`` takes ``position_ids``.
        device: Where the tensors go.
    """
    ids, mask, first = _pad([(*row.prompt, *row.answer) for row in rows], pad_id, side)
    lengths = torch.tensor([len(row.prompt) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if takes_positions:
        inputs["position_ids"] = positions(mask)
    prompt_end = first + lengths - 1
    subject = torch.tensor([row.subject_end for row in rows])
    answer_ids, answer_mask, _ = _pad([row.answer for row in rows], pad_id, "right")
    columns = prompt_end[:, None] + torch.arange(answer_ids.shape[1])[None]
    return _on(
        device,
        inputs,
        prompt_end,
        torch.where(subject >= 0, subject + first, -1),
        answer_ids,
        answer_mask,
        columns.clamp(max=ids.shape[1] - 1),
    )


def pad_tails(
    rows: Sequence[EncodedRow],
    cuts: Sequence[int],
    pad_id: int,
    takes_positions: bool,
    device: torch.device,
) -> tuple[dict[str, Tensor], TokenRows]:
    """Cut rows of a decoder in two: what a first pass reads, and what passes on top of it read.

    Heads are padded on the left and tails on the right, so all tails start in the same column.

    Args:
        rows: The rows.
        cuts: Number of tokens in each head; less than the length of the prompt.
        pad_id: Id put where there is no token.
        takes_positions: Whether the model's ``forward`` takes ``position_ids``.
        device: Where the tensors go.

    Returns:
        Inputs of the heads, and the tails.  The attention mask of the tails covers heads too; their
        columns count from the start of the tail.
    """
    pairs = list(zip(rows, cuts, strict=True))
    head, head_mask, _ = _pad([row.prompt[:at] for row, at in pairs], pad_id, "left")
    tails = [
        EncodedRow(row.prompt[at:], row.answer, max(-1, row.subject_end - at)) for row, at in pairs
    ]
    padded = pad_rows(tails, pad_id, "right", False, device)
    mask = torch.cat([head_mask.to(device), padded.attention_mask], dim=1)
    inputs = {"input_ids": padded.inputs["input_ids"], "attention_mask": mask}
    first = {"input_ids": head.to(device), "attention_mask": head_mask.to(device)}
    if takes_positions:
        first["position_ids"], inputs["position_ids"] = positions(mask).split(
            [head.shape[1], mask.shape[1] - head.shape[1]], dim=1
        )
    return first, replace(padded, inputs=inputs)


def pad_encoder_decoder_rows(
    rows: Sequence[EncodedRow],
    pad_id: int,
    start_id: int,
    suffix: Sequence[int],
    device: torch.device,
) -> TokenRows:
    """Pad rows of an encoder-decoder: the prompt goes to the encoder, the answer to the decoder.

    The decoder's first column, the start token, predicts the first answer token.
    """
    ids, mask, first = _pad([(*row.prompt, *suffix) for row in rows], pad_id, "right")
    shifted = [(start_id, *row.answer[:-1]) if row.answer else (start_id,) for row in rows]
    decoder_ids, decoder_mask, _ = _pad(shifted, pad_id, "right")
    answer_ids, answer_mask, _ = _pad([row.answer for row in rows], pad_id, "right")
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }
    subject = torch.tensor([row.subject_end for row in rows])
    columns = torch.arange(answer_ids.shape[1])[None].expand(len(rows), -1)
    # In the decoder the prompt is the start token alone.
    end = torch.zeros(len(rows), dtype=torch.long)
    where = torch.where(subject >= 0, subject + first, -1)
    return _on(device, inputs, end, where, answer_ids, answer_mask, columns)


def _on(
    device: torch.device,
    inputs: dict[str, Tensor],
    prompt_end: Tensor,
    subject_end: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    answer_columns: Tensor,
) -> TokenRows:
    return TokenRows(
        {name: tensor.to(device) for name, tensor in inputs.items()},
        prompt_end.to(device),
        subject_end.to(device),
        answer_ids.to(device),
        answer_mask.bool().to(device),
        answer_columns.to(device),
    )
