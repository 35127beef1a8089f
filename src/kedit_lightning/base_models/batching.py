"""Which rows a model may read together: some decoders take padding for tokens, as RWKV does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from kedit_lightning.base_models.rows import EncodedRow, TokenRows, pad_rows
from kedit_lightning.decoding_settings import generation_config, neutral_options
from kedit_lightning.edits import EditStack
from kedit_lightning.edits.weight_storage import device_of

#: Largest relative difference between a padded row and the same row alone, by bytes of the dtype.
_SAME = {8: 1e-6, 4: 1e-4, 2: 5e-2}
#: The same between two fillings of the padding, whose passes have one shape.
_SAME_FILLED = {8: 1e-6, 4: 1e-5, 2: 1e-2}
#: Logits held at a time (numbers).
_LOGITS = 1 << 26
#: Errors of models whose logits have another form; rows of one length ask nothing of the mask.
_OTHER_FORM = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


Row = TypeVar("Row")


class Decoder(Protocol):
    """What batching needs of a base model."""

    model: Any
    edits: EditStack
    takes_positions: bool

    @property
    def pad_id(self) -> int:
        """Id put where there is no token."""

    @property
    def device(self) -> torch.device:
        """Device of its first weights."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its weights."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompt and answer go to different stacks of blocks."""

    def logits_at(self, rows: TokenRows, columns: Tensor) -> Tensor:
        """Logits ``[batch, width, vocab]`` at columns ``[batch, width]``."""


class Batching:
    """Which rows a base model may read together; each question is tried once, when it arises."""

    def __init__(self, base: Decoder) -> None:
        self._base = base

    @cached_property
    def reads_mask(self) -> bool:
        """Whether padding before a row changes nothing; some decoders ignore attention masks."""
        base = self._base

        def last_logits(encoded: Sequence[EncodedRow], pad_id: int) -> Tensor:
            rows = pad_rows(encoded, pad_id, "left", base.takes_positions, base.device)
            return base.logits_at(rows, rows.prompt_end[:, None])[:, 0]

        with base.edits.suspended():
            return masks_padding(last_logits, embedded_tokens(base.model), base.dtype)

    @cached_property
    def decodes_together(self) -> bool:
        """Whether rows of one length are continued together as they are alone; RWKV's are not."""
        with self._base.edits.suspended():
            return rows_decode_apart(self._base.model, self._base.pad_id)

    def parts(self, lengths: Sequence[int], size: int) -> list[list[int]]:
        """Numbers of the rows, of these lengths, that are continued together: ``size`` at most."""
        if self._base.is_encoder_decoder or len(lengths) < 2 or self.reads_mask:
            return parts_of(lengths, size, alike=False)
        return parts_of(lengths, size if self.decodes_together else 1, alike=True)


def embedded_tokens(model: Any) -> int:
    """Number of tokens that have an embedding; without bound where the model does not say."""
    embedding = model.get_input_embeddings()
    entries = getattr(embedding, "num_embeddings", None)
    if entries is None:
        weight = getattr(embedding, "weight", None)
        entries = len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else 0
    return int(entries) or sys.maxsize


@torch.no_grad()
def masks_padding(
    last_logits: Callable[[Sequence[EncodedRow], int], Tensor], entries: int, dtype: torch.dtype
) -> bool:
    """Whether a left-padded row answers as it does alone, whatever the padding is.

    Args:
        last_logits: Logits ``[rows, vocab]`` behind each prompt, padded on the left with an id.
        entries: Number of tokens that have an embedding.
        dtype: Dtype of the forward pass.
    """
    ids = [(7 * i + 3) % min(entries, 1000) for i in range(16)]
    short, long = EncodedRow(tuple(ids[:4]), ()), EncodedRow(tuple(ids[4:]), ())
    try:
        alone = last_logits([short], ids[0])[0]
        first, second = (last_logits([short, long], id)[0] for id in (ids[9], ids[13]))
    except _OTHER_FORM:
        return False
    return (
        _difference(first, alone) <= _SAME[dtype.itemsize]
        and _difference(first, second) <= _SAME_FILLED[dtype.itemsize]
    )


@torch.no_grad()
def rows_decode_apart(model: Any, pad_id: int) -> bool:
    """Whether two rows of one length are continued together as each is alone."""
    options = {**neutral_options(generation_config(model)), "pad_token_id": pad_id}
    entries = min(embedded_tokens(model), 1000)
    ids = torch.tensor([(7 * i + 3) % entries for i in range(8)], device=device_of(model))

    def continued(rows: Tensor) -> Tensor:
        mask, length = torch.ones_like(rows), {"min_new_tokens": 4, "max_new_tokens": 4}
        after: Tensor = model.generate(inputs=rows, attention_mask=mask, **length, **options)
        return after

    try:
        together = continued(ids.reshape(2, 4))
        return torch.equal(
            together, torch.cat([continued(ids[None, :4]), continued(ids[None, 4:])])
        )
    except _OTHER_FORM:
        return False


def logit_batches(
    rows: Iterable[Row], answer_length: Callable[[Row], int], vocabulary: int, size: int
) -> Iterator[list[Row]]:
    """Cut rows into batches of a forward pass that holds logits at the tokens of their answers.

    Args:
        rows: Sorted by the length of their answers, the longest last.
        answer_length: Tokens of a row's answer.
        vocabulary: Logits of a token; batches are cut finer where it is large.
        size: Most rows of a batch.
    """
    batch: list[Row] = []
    for row in rows:
        numbers = (len(batch) + 1) * max(1, answer_length(row)) * vocabulary
        if batch and (len(batch) == size or numbers > _LOGITS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def cheapest_parts(count: int, costs: Callable[[int], Iterable[float]]) -> list[slice]:
    """Cut things that stand in a row into the parts that cost least together.

    Args:
        count: Number of the things.
        costs: Costs of the parts that end before a number: that of the last thing alone, then those
            of longer parts, one more each, as far as they are allowed.

    >>> cheapest_parts(3, lambda end: [[5], [5, 6], [5, 9, 20]][end - 1])
    [slice(0, 2, None), slice(2, 3, None)]
    """
    best, start_of = [0.0], [0]
    for end in range(1, count + 1):
        sums = ((best[end - n] + cost, n) for n, cost in enumerate(costs(end), 1))
        cost, number = min(sums)
        best.append(cost)
        start_of.append(end - number)
    parts, end = list[slice](), count
    while end:
        parts.append(slice(start_of[end], end))
        end = start_of[end]
    return parts[::-1]


def like_lengths(lengths: Sequence[int], overhead: int) -> list[list[int]]:
    """Numbers of the rows that are read together, so that padding costs least; shortest first.

    A pass costs the number of its tokens, padding included, and ``overhead``.

    >>> like_lengths([3, 90, 4, 88], overhead=40), like_lengths([3, 9, 4, 8], overhead=40)
    ([[0, 2], [3, 1]], [[0, 2, 3, 1]])
    """
    rows_of: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        rows_of.setdefault(lengths[row], []).append(row)
    alike = list(rows_of.values())  # rows of one length are never apart

    def costs(end: int) -> Iterator[int]:
        rows, width = 0, lengths[alike[end - 1][0]]
        for own in reversed(alike[:end]):
            rows += len(own)
            yield overhead + rows * width

    return [
        [row for own in alike[part] for row in own] for part in cheapest_parts(len(alike), costs)
    ]


def parts_of(lengths: Sequence[int], size: int, alike: bool) -> list[list[int]]:
    """Numbers of the rows that are continued together, ``size`` at most; ``alike``: of one length.

    >>> parts_of([3, 4, 3], 2, alike=False), parts_of([3, 4, 3], 2, alike=True)
    ([[0, 1], [2]], [[0, 2], [1]])
    """
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length if alike else 0, []).append(i)
    return [
        rows[start : start + size]
        for rows in groups.values()
        for start in range(0, len(rows), size)
    ]


def _difference(one: Tensor, other: Tensor) -> float:
    """Relative difference of two logits ``[vocab]``, up to what a softmax does not see."""
    one, other = (logits.double() - logits.double().mean() for logits in (one, other))
    return float((one - other).norm() / other.norm().clamp(min=1e-12))
