"""Prompts that are read once for all that follows them: answers, and free generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kedit_lightning.base_models.base_model import BaseModel
from kedit_lightning.base_models.batching import like_lengths
from kedit_lightning.base_models.continuation import can_resume, copied
from kedit_lightning.base_models.head_cache import attends_to_all
from kedit_lightning.base_models.prefill import (
    BlockOutputs,
    empty_cache,
    prefilling,
    unchanged_blocks,
)
from kedit_lightning.base_models.rows import (
    EncodedRow,
    TokenRows,
    answering,
    pad_heads,
    pad_rows,
    put_behind,
    without_last,
)
from kedit_lightning.base_models.taps import noting_calls, skipping
from kedit_lightning.edits.effects import RewritePrompt
from kedit_lightning.edits.projections import first_tensor

#: What a pass costs beside its tokens, in tokens.
OVERHEAD = 40
#: Names of the tensors in a layer of a cache.
_HELD = ("keys", "values")


def can_share(base: BaseModel) -> bool:
    """Whether what follows a prompt can be read on top of its cache, under the edits of now."""
    edits = base.edits
    if edits.active and edits.effects(RewritePrompt):
        return False
    with edits.suspended() if edits.spares_heads else nullcontext():
        return can_resume(base) and attends_to_all(base)


@dataclass(frozen=True)
class HeadPart:
    """Heads of about equal length that are read together.

    Args:
        numbers: Which of the prompts they begin.
        inputs: Their tokens, padded on the left. Shape ``[rows, tokens]`` each.
        cache: Their keys and values.
        outputs: What blocks have given in that pass, if it was without edits.
    """

    numbers: Sequence[int]
    inputs: Mapping[str, Tensor]
    cache: Any
    outputs: BlockOutputs

    @classmethod
    def of(
        cls, base: BaseModel, numbers: Sequence[int], heads: Sequence[tuple[int, ...]]
    ) -> HeadPart:
        """Some heads, read under the edits of now."""
        inputs = pad_heads(heads, base.pad_id, base.takes_positions, base.device)
        outputs: BlockOutputs = {}
        # The model is called here: few frames lie between a command and a forward hook.
        with prefilling(base, None if base.edits.active else outputs) as prefill:
            prefill.output = base.model(**inputs, **prefill.options)
        return cls(numbers, inputs, prefill.cache, outputs)

    def above(self, base: BaseModel, block: int) -> HeadPart:
        """The same heads under edits that change nothing below a block."""
        below = [base.layout.block_name(index) for index in range(block)]
        known = {name: self.outputs[name] for name in below}
        with skipping(base.model, known), prefilling(base) as prefill:
            prefill.output = base.model(**self.inputs, **prefill.options)
        cache = prefill.cache
        cache.layers[:block] = copied(self.cache).layers[:block]
        return replace(self, cache=cache, outputs={})


def parts_of_heads(base: BaseModel, heads: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Numbers of the heads that are read together."""
    if empty_cache(base) is None:
        return [list(range(len(heads)))]
    return like_lengths([max(1, len(head)) for head in heads], OVERHEAD)


class Tails:
    """What follows prompts, to be read in one pass.

    Args:
        base: The base model.
        rows: The rows, padded.
        cache: The cache that they are read behind; it grows.
    """

    def __init__(self, base: BaseModel, rows: TokenRows, cache: Any) -> None:
        self.rows, self.cache = rows, cache
        #: Options of the pass.
        self.options = {"past_key_values": cache, "use_cache": True}
        self._base = base
        self._below: Any = None

    @contextmanager
    def noting(self, blocks: int) -> Iterator[None]:
        """Inside, the pass notes the output of so many first blocks."""
        last = self._names(blocks)[-1:]
        with noting_calls(self._base.model, last) as calls:
            yield
        self._below = calls[last[0]][0].output if last else None

    @contextmanager
    def above(self, blocks: int, plain: Tails | None) -> Iterator[None]:
        """Inside, the pass begins behind so many first blocks, which change nothing.

        Args:
            blocks: Number of blocks.
            plain: The same rows, read without edits while it was :meth:`noting` as many blocks; if
                not given, all blocks run.
        """
        below = {} if plain is None else dict.fromkeys(self._names(blocks), plain._below)
        with skipping(self._base.model, below):
            yield
        if plain is not None:
            self.cache.layers[:blocks] = plain.cache.layers[:blocks]

    def _names(self, blocks: int) -> list[str]:
        return [self._base.layout.block_name(index) for index in range(blocks)]


class SharedPrompts:
    """The key-value cache of some prompts, all but their last tokens.

    What follows them is as after complete passes, up to the order in which kernels add.

    Args:
        base: The base model, as its stack stands, with the edits that rows of the prompts carry;
            see :func:`can_share`.
        prompts: The prompts without pictures, not all of one token.
        plain: The same prompts without edits: blocks below all edits need not run again.
    """

    def __init__(
        self,
        base: BaseModel,
        prompts: Sequence[EncodedRow],
        plain: SharedPrompts | None = None,
    ) -> None:
        self._base = base
        silent = base.edits.suspended() if base.edits.spares_heads else nullcontext()
        with torch.no_grad(), silent:
            self._parts = list(self._read(prompts, plain))
        self._cache = joined([part.cache for part in self._parts])
        masks = [part.inputs["attention_mask"] for part in self._parts]
        width = max(mask.shape[1] for mask in masks)
        self._mask = torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in masks])
        order = [number for part in self._parts for number in part.numbers]
        self._place = {number: place for place, number in enumerate(order)}

    def _read(
        self, prompts: Sequence[EncodedRow], plain: SharedPrompts | None
    ) -> Iterator[HeadPart]:
        """The heads of prompts; blocks below all edits do not run again where they are known."""
        base, count, block = self._base, len(prompts), unchanged_blocks(self._base)
        known = plain._parts if plain is not None else []
        if block == len(base.layout) and known:
            yield from known
        elif block and known and all(part.outputs for part in known):
            for part in known:
                with base.edits.carried_by(part.numbers, count):
                    yield part.above(base, block)
        else:
            heads = [row.prompt[:-1] for row in prompts]
            for numbers in parts_of_heads(base, heads):
                with base.edits.carried_by(numbers, count):
                    yield HeadPart.of(base, numbers, [heads[number] for number in numbers])

    def tails(self, encoded: Sequence[EncodedRow], numbers: Sequence[int]) -> Tails:
        """Padded rows of what follows the prompts.

        Args:
            encoded: Prompts with their answers; padded are the last token of each prompt, and its
                answer but for the last token.
            numbers: Which of the prompts each of them has.
        """
        base = self._base
        tails = [EncodedRow(row.prompt[-1:], row.answer) for row in encoded]
        rows = pad_rows(without_last(tails), base.pad_id, "right", False, base.device)
        mask, cache = self.behind(numbers)
        behind = put_behind(mask, rows, base.takes_positions)
        return Tails(base, answering(behind, tails, base.pad_id), cache)

    def forget_outputs(self) -> None:
        """Give up the memory of what blocks have given."""
        self._parts = [replace(part, outputs={}) for part in self._parts]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, as far as it says what it holds, and of the outputs of blocks."""
        held = [getattr(layer, name, None) for layer in self._cache.layers for name in _HELD]
        held += [first_tensor(out) for part in self._parts for out in part.outputs.values()]
        return sum(part.nbytes for part in held if isinstance(part, Tensor))

    def some(self, numbers: Sequence[int]) -> SomePrompts:
        """Some of the prompts, for free generation."""
        return SomePrompts(self._base, self, numbers)

    def behind(self, numbers: Sequence[int]) -> tuple[Tensor, Any]:
        """Attention mask of the caches of some prompts, and a copy of these that may grow."""
        places = [self._place[number] for number in numbers]
        index = torch.tensor(places, device=self._mask.device)
        cache = copied(self._cache)
        cache.batch_select_indices(index)
        return self._mask[index], cache


def joined(caches: Sequence[Any]) -> Any:
    """One cache of the rows of several, padded on the left; these become views of it."""
    if len(caches) == 1:
        return caches[0]
    whole, width = copied(caches[0]), max(cache.get_seq_length() for cache in caches)
    for number, layer in enumerate(whole.layers):
        own = [cache.layers[number] for cache in caches]
        for name in _HELD:
            parts = [getattr(one, name) for one in own]
            wide = torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])
            setattr(layer, name, wide)
            views = wide.split([len(part) for part in parts])
            for one, part, view in zip(own, parts, views, strict=True):
                setattr(one, name, view[:, :, width - part.shape[2] :])
    return whole


class SomePrompts:
    """Some prompts of :class:`SharedPrompts`, as free generation takes them.

    Args:
        base: The base model.
        shared: The prompts.
        numbers: Which of them.
    """

    def __init__(self, base: BaseModel, shared: SharedPrompts, numbers: Sequence[int]) -> None:
        self._base, self._shared, self._numbers = base, shared, numbers

    def prompts(self, encoded: Sequence[EncodedRow]) -> tuple[TokenRows, Any] | None:
        """The prompts padded on the left, and their cache; ``None`` where others are asked for."""
        if len(encoded) != len(self._numbers) or self._base.edits.reads_prompts:
            return None
        base, (mask, cache) = self._base, self._shared.behind(self._numbers)
        rows = base.pad(encoded, "left")
        gap = mask.shape[1] + 1 - rows.attention_mask.shape[1]
        inputs = {
            "input_ids": pad(rows.inputs["input_ids"], (gap, 0), value=base.pad_id),
            "attention_mask": pad(rows.attention_mask, (gap, 0)),
        }
        if not torch.equal(inputs["attention_mask"][:, :-1], mask):
            return None
        return replace(rows, inputs=inputs, prompt_end=rows.prompt_end + gap), cache
