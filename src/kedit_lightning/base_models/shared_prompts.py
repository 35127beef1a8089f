"""Prompts that are read once for all that follows them: answers, and free generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kedit_lightning.base_models.base_model import BaseModel
from kedit_lightning.base_models.continuation import can_resume, copied
from kedit_lightning.base_models.head_cache import attends_to_all
from kedit_lightning.base_models.rows import (
    EncodedRow,
    TokenRows,
    answering,
    pad_rows,
    pad_tails,
    put_behind,
    without_last,
)
from kedit_lightning.edits.effects import RewritePrompt

#: Names of the tensors in a layer of a cache.
_HELD = ("keys", "values")


def can_share(base: BaseModel) -> bool:
    """Whether what follows a prompt can be read on top of its cache, under the edits of now."""
    edits = base.edits
    rewritten = edits.active and bool(edits.effects(RewritePrompt))
    return not rewritten and can_resume(base) and attends_to_all(base)


class SharedPrompts:
    """The key-value cache of some prompts, all but their last tokens.

    What follows them is as after complete passes, up to the order in which kernels add.

    Args:
        base: The base model, as its stack stands, with the edits that rows of the prompts carry;
            see :func:`can_share`.
        prompts: The prompts without pictures, not all of one token.
    """

    def __init__(self, base: BaseModel, prompts: Sequence[EncodedRow]) -> None:
        self._base = base
        rows = [EncodedRow(row.prompt, ()) for row in prompts]
        cuts = [len(row.prompt) - 1 for row in rows]
        head, _ = pad_tails(rows, cuts, base.pad_id, base.takes_positions, base.device)
        self._mask = head["attention_mask"]
        with torch.no_grad():
            options = {"use_cache": True, "logits_to_keep": 1}
            self._cache: Any = base.model(**head, **options).past_key_values

    def answer_rows(
        self, encoded: Sequence[EncodedRow], numbers: Sequence[int]
    ) -> tuple[TokenRows, dict[str, Any]]:
        """Padded rows of what follows the prompts, and the options of a pass over them.

        Args:
            encoded: Prompts with their answers; padded are the last token of each prompt, and its
                answer but for the last token.
            numbers: Which of the prompts each of them has.
        """
        base = self._base
        tails = [EncodedRow(row.prompt[-1:], row.answer) for row in encoded]
        rows = pad_rows(without_last(tails), base.pad_id, "right", False, base.device)
        mask, cache = self.behind(numbers)
        options = {"past_key_values": cache, "use_cache": True}
        behind = put_behind(mask, rows, base.takes_positions)
        return answering(behind, tails, base.pad_id), options

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, as far as it says what it holds."""
        held = (getattr(layer, name, None) for layer in self._cache.layers for name in _HELD)
        return sum(part.nbytes for part in held if isinstance(part, Tensor))

    def some(self, numbers: Sequence[int]) -> SomePrompts:
        """Some of the prompts, for free generation."""
        return SomePrompts(self._base, self, numbers)

    def behind(self, numbers: Sequence[int]) -> tuple[Tensor, Any]:
        """Attention mask of the caches of some prompts, and a copy of these that may grow."""
        index = torch.tensor(numbers, device=self._mask.device)
        cache = copied(self._cache)
        cache.batch_select_indices(index)
        return self._mask[index], cache


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
        if len(encoded) != len(self._numbers):
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
