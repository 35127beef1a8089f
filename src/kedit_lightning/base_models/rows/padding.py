"""From rows of different lengths to the tensors of a forward pass.

Position ids follow the attention mask, and every column is counted from the first token of its row.
So padding side, batch size and order of rows never change a result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.base_models.rows.encoding import EncodedRow
from kedit_lightning.base_models.rows.position import positions

PaddingSide: TypeAlias = Literal["left", "right"]


@dataclass(frozen=True)
class RowPictures:
    """What a model is given of the pictures of one row.

    Args:
        inputs: Tensors of its call, such as ``pixel_values``; those of rows are joined along the
            first axis.
        features: Output of the model's ``get_image_features`` for them, in place of pixels.
        positioned: Whether the model finds the positions of rows with pictures by itself.
        kept: Features that are given in another way: in place of embeddings, or to be attended to.
    """

    inputs: Mapping[str, Tensor]
    features: Any = None
    positioned: bool = False
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenRows:
    """Padded rows, ready for a forward pass.

    Args:
        inputs: What the model takes: ids, attention mask, and position ids or decoder ids where it
            knows them. Shape ``[batch, tokens]`` each.
        prompt_end: Column of each row's last prompt token. Shape ``[batch]``.
        subject_start: Column of the first subject token, ``-1`` without one. Shape ``[batch]``.
        subject_end: Column of the last subject token, ``-1`` without one. Shape ``[batch]``.
        answer_ids: Ids of the answers, padded on the right. Shape ``[batch, width]``.
        answer_mask: Where ``answer_ids`` is no padding. Shape ``[batch, width]``.
        answer_columns: Column whose logits predict each answer token. Shape ``[batch, width]``.
        pictures: What the model is given of each row's pictures; ``None`` for rows without.
        types: Other inputs with a value a token, such as ``token_type_ids``, ``[batch, tokens]``
            each, or with an entry a row.
    """

    inputs: dict[str, Tensor]
    prompt_end: Tensor
    subject_start: Tensor
    subject_end: Tensor
    answer_ids: Tensor
    answer_mask: Tensor
    answer_columns: Tensor
    pictures: tuple[RowPictures | None, ...] = ()
    types: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_end)

    @property
    def attention_mask(self) -> Tensor:
        """Where tokens are no padding. Shape ``[batch, tokens]``."""
        return self.inputs["attention_mask"]

    @property
    def subject_mask(self) -> Tensor:
        """Where the tokens of the subjects are. Bool, shape ``[batch, tokens]`` of the inputs."""
        start, end = self.subject_start[:, None], self.subject_end[:, None]
        columns = torch.arange(self.inputs["input_ids"].shape[1], device=start.device)
        return (start >= 0) & (columns >= start) & (columns <= end)

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of a forward pass: ``inputs``, and what belongs to pictures."""
        seen = [one for one in self.pictures if one is not None]
        if not seen:
            return {**self.inputs, **self.types}
        names = dict.fromkeys(name for one in seen for name in one.inputs)
        values: dict[str, Any] = {
            name: torch.cat([one.inputs[name] for one in seen]) for name in names
        }
        if features := [one.features for one in seen if one.features is not None]:
            values["mm_encoder_outputs"] = {"image": joined(features)}
        inputs = {**self.inputs, **self.types, **values}
        if any(one.positioned for one in seen):
            inputs.pop("position_ids", None)
        return inputs

    def select(self, index: Tensor) -> TokenRows:
        """Some of the rows, by number. Shape of ``index``: ``[n]``."""
        rows = self._each(lambda tensor: tensor[index])
        if not self.pictures:
            return rows
        return replace(rows, pictures=tuple(self.pictures[i] for i in index.tolist()))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TokenRows:
        """The rows after a change of each tensor; pictures stay as they are."""
        inputs, types = (
            {name: change(value) for name, value in values.items()}
            for values in (self.inputs, self.types)
        )
        kept = ("inputs", "types", "pictures")
        names = [f.name for f in fields(self) if f.name not in kept]
        others: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return TokenRows(inputs, **others, pictures=self.pictures, types=types)


def joined(features: Sequence[Any]) -> Any:
    """Visual features of several rows as the model makes them of all their pictures at once.

    ``pooler_output`` holds the pictures one after another, as a tensor or a list; what else a
    model adds has such lists for each of its layers.  Always a new object: models change it.
    """
    first = features[0]
    fresh = copy.copy(first)
    for name in first:
        fresh[name] = _one_after_another([one[name] for one in features], name != "pooler_output")
    return fresh


def _one_after_another(values: Sequence[Any], by_layer: bool) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return first if len(values) == 1 else torch.cat(list(values))
    if by_layer:
        return [_one_after_another(layer, False) for layer in zip(*values, strict=True)]
    return [picture for own in values for picture in own]


def _pad(
    rows: Sequence[Sequence[int]], fill: int, side: PaddingSide
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask, ``[batch, tokens]``, and the column of each row's first token, ``[batch]``."""
    width = max([1, *map(len, rows)])
    padded: list[list[int]] = []
    for row in rows:
        gap = [fill] * (width - len(row))
        padded.append([*gap, *row] if side == "left" else [*row, *gap])
    ids = torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    first = width - lengths if side == "left" else torch.zeros_like(lengths)
    columns = torch.arange(width)
    start, end = first[:, None], (first + lengths)[:, None]
    return ids, ((columns >= start) & (columns < end)).long(), first


def _token_rows(
    rows: Sequence[EncodedRow],
    inputs: dict[str, Tensor],
    first: Tensor,
    prompt_end: Tensor,
    pad_id: int,
    device: torch.device,
) -> TokenRows:
    """Rows on a device, from padded inputs, first column and last prompt column of each row."""

    def columns(indices: Sequence[int]) -> Tensor:
        index = torch.tensor(indices, dtype=torch.long)
        return torch.where(index >= 0, index + first, -1)

    answer_ids, answer_mask, _ = _pad([row.answer for row in rows], pad_id, "right")
    answered = inputs.get("decoder_input_ids", inputs["input_ids"])
    answer_columns = prompt_end[:, None] + torch.arange(answer_ids.shape[1])[None]
    return TokenRows(
        inputs,
        prompt_end=prompt_end,
        subject_start=columns([row.subject_start for row in rows]),
        subject_end=columns([row.subject_end for row in rows]),
        answer_ids=answer_ids,
        answer_mask=answer_mask.bool(),
        answer_columns=answer_columns.clamp(max=answered.shape[1] - 1),
    )._each(lambda tensor: tensor.to(device))


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
    inputs = {"input_ids": ids, "attention_mask": mask}
    if takes_positions:
        inputs["position_ids"] = positions(mask)
    prompt_end = first + torch.tensor([len(row.prompt) for row in rows], dtype=torch.long) - 1
    return _token_rows(rows, inputs, first, prompt_end, pad_id, device)


def without_last(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """Rows without the last token of each answer, whose logits nobody reads."""
    return [replace(row, answer=row.answer[:-1]) for row in rows]


def answering(padded: TokenRows, rows: Sequence[EncodedRow], pad_id: int) -> TokenRows:
    """Padded rows of :func:`without_last`, with the whole answers to predict."""
    ids, mask, _ = _pad([row.answer for row in rows], pad_id, "right")
    device, last = padded.prompt_end.device, padded.inputs["input_ids"].shape[1] - 1
    columns = padded.prompt_end[:, None] + torch.arange(ids.shape[1], device=device)
    return replace(
        padded,
        answer_ids=ids.to(device),
        answer_mask=mask.bool().to(device),
        answer_columns=columns.clamp(max=last),
    )


def pad_types(
    rows: Sequence[EncodedRow], padded: TokenRows, taken: Collection[str]
) -> dict[str, Tensor]:
    """Inputs with a value a token, for rows of which some have pictures. ``[batch, tokens]`` each.

    Padding, answers, and rows without pictures have the type of text, which is 0.

    Args:
        rows: The rows.
        padded: The same rows, padded.
        taken: Names of the inputs that the model takes.
    """
    found: dict[str, Tensor] = {}
    mask = padded.attention_mask
    for name in dict.fromkeys(name for row in rows for name, _ in row.types if name in taken):
        types = torch.zeros_like(mask)
        for i, values in enumerate(dict(row.types).get(name, ()) for row in rows):
            first, count = int(mask[i].argmax()), min(len(values), len(rows[i].prompt))
            types[i, first : first + count] = torch.tensor(values[:count], dtype=mask.dtype)
        found[name] = types
    return found


def prompt_types(rows: TokenRows) -> dict[str, Tensor]:
    """Types that tell prompts, 0, from answers and padding, 1: prompts are read as a whole."""
    mask, ends = rows.attention_mask, rows.prompt_end[:, None]
    columns = torch.arange(mask.shape[1], device=mask.device)
    return {"token_type_ids": 1 - ((columns <= ends) & mask.bool()).to(mask)}


def pad_heads(
    heads: Sequence[tuple[int, ...]], pad_id: int, takes_positions: bool, device: torch.device
) -> dict[str, Tensor]:
    """Beginnings of rows, padded on the left, as a model takes them. ``[rows, tokens]`` each."""
    ids, mask, _ = _pad(heads, pad_id, "left")
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if takes_positions:
        inputs["position_ids"] = positions(inputs["attention_mask"])
    return inputs


def pad_tails(
    rows: Sequence[EncodedRow],
    cuts: Sequence[int],
    pad_id: int,
    takes_positions: bool,
    device: torch.device,
) -> tuple[dict[str, Tensor], TokenRows]:
    """Cut rows of a decoder in two: heads for a key-value cache, tails for passes on top of it.

    Heads are padded on the left and tails on the right, so all tails start in the same column.  The
    attention mask of the tails covers heads too; their columns count from the start of the tail.
    Of a subject that begins in the head, the tail knows the tokens behind the cut.  The last token
    of the longest answer is left out: it predicts none.

    ``cuts`` is the number of tokens in each head, less than the length of the prompt; the other
    arguments are those of :func:`pad_rows`.
    """
    pairs = list(zip(rows, cuts, strict=True))
    first = pad_heads([row.prompt[:at] for row, at in pairs], pad_id, takes_positions, device)
    tails = []
    for row, at in pairs:
        end = max(-1, row.subject_end - at)
        start = -1 if min(row.subject_start, end) < 0 else max(0, row.subject_start - at)
        tails.append(EncodedRow(row.prompt[at:], row.answer, end, start))
    padded = _without_ends(pad_rows(tails, pad_id, "right", False, device), tails)
    return first, put_behind(first["attention_mask"], padded, takes_positions)


def _without_ends(padded: TokenRows, rows: Sequence[EncodedRow]) -> TokenRows:
    """Rows padded on the right, as far as tokens predict others of the answers."""
    width = max(len(row.prompt) + max(0, len(row.answer) - 1) for row in rows)
    inputs = {name: values[:, :width] for name, values in padded.inputs.items()}
    columns = padded.answer_columns.clamp(max=width - 1)
    return replace(padded, inputs=inputs, answer_columns=columns)


def put_behind(head_mask: Tensor, tails: TokenRows, takes_positions: bool) -> TokenRows:
    """Tails whose attention mask and positions follow heads. ``head_mask``: ``[batch, heads]``."""
    mask = torch.cat([head_mask, tails.attention_mask], dim=1)
    inputs = {"input_ids": tails.inputs["input_ids"], "attention_mask": mask}
    if takes_positions:
        inputs["position_ids"] = positions(mask)[:, head_mask.shape[1] :]
    return replace(tails, inputs=inputs)


def pad_encoder_decoder_rows(
    rows: Sequence[EncodedRow],
    pad_id: int,
    start_id: int,
    suffix: Sequence[int],
    device: torch.device,
) -> TokenRows:
    """Pad rows of an encoder-decoder: the prompt goes to the encoder, the answer to the decoder.

    ``prompt_end`` is the decoder's first column, the start token, which predicts the first answer
    token.  Columns of subjects are those of the encoder.
    """
    ids, mask, first = _pad([(*row.prompt, *suffix) for row in rows], pad_id, "right")
    shifted = [(start_id, *row.answer[:-1]) if row.answer else (start_id,) for row in rows]
    decoder_ids, decoder_mask, _ = _pad(shifted, pad_id, "right")
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }
    prompt_end = torch.zeros(len(rows), dtype=torch.long)
    return _token_rows(rows, inputs, first, prompt_end, pad_id, device)
