"""Prefix states: what a model makes of the text that several prompts begin with, computed once.

Under an in-context edit all questions stand behind the same demonstrations and facts.  Their
key-value cache is filled once, and each question is read on top of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from kedit_lightning.base_models.base_model import BaseModel
from kedit_lightning.base_models.continuation import SAME, can_resume, copied
from kedit_lightning.base_models.head_cache import attends_to_all, holds_keys
from kedit_lightning.base_models.rows import EncodedRow, TokenRows, pad_rows, pad_tails
from kedit_lightning.base_models.rows.position import positions
from kedit_lightning.edits.effects import RewritePrompt

#: Shortest common beginning that is worth a pass of its own, in tokens.
SHORTEST = 16


class PrefixStates:
    """The key-value cache of one beginning of prompts, kept for those that begin with it next.

    Models whose passes cannot be resumed, edits that look at rows, and prompts with pictures get
    complete passes; the results are the same up to the order in which kernels add.

    Args:
        base: The base model; its weights must stay as they are.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        #: Stack of edits and tokens that the cache was filled for.
        self._key: Any = None
        self._cache: Any = None

    def answer_logits(self, encoded: Sequence[EncodedRow]) -> tuple[TokenRows, Tensor]:
        """Padded rows and the logits that predict their answers, ``[batch, width, vocab]``.

        The rows are whole, or what follows their common beginning.
        """
        base, shared = self._base, self.shared(encoded)
        if not shared:
            rows = base.pad(encoded)
            return rows, base.answer_logits(rows)
        cuts = [shared] * len(encoded)
        _, rows = pad_tails(encoded, cuts, base.pad_id, base.takes_positions, base.device)
        columns = rows.answer_columns
        at = torch.arange(len(rows), device=columns.device)[:, None].expand_as(columns)
        cache = self.cache(encoded[0].prompt[:shared], len(rows))
        places = at.flatten(), columns.flatten()
        flat = base.logits_of(rows, places, past_key_values=cache, use_cache=True)
        return rows, flat.reshape(*columns.shape, -1)

    def prompts(self, encoded: Sequence[EncodedRow]) -> tuple[TokenRows, Any] | None:
        """Prompts for ``generate`` behind their common beginning, and its cache.

        What follows is padded on the left.  ``None`` where they must be read whole.
        """
        base, shared = self._base, self.shared(encoded)
        if not shared or not (self.bears_gaps or len({len(row.prompt) for row in encoded}) == 1):
            return None
        prefix = encoded[0].prompt[:shared]
        tails = [EncodedRow(row.prompt[shared:], ()) for row in encoded]
        rows = pad_rows(tails, base.pad_id, "left", False, base.device)
        head = torch.tensor(prefix, device=base.device).expand(len(rows), -1)
        inputs = {
            "input_ids": torch.cat([head, rows.inputs["input_ids"]], dim=1),
            "attention_mask": torch.cat([torch.ones_like(head), rows.attention_mask], dim=1),
        }
        rows = replace(rows, inputs=inputs, prompt_end=rows.prompt_end + shared)
        return rows, self.cache(prefix, len(rows))

    def shared(self, encoded: Sequence[EncodedRow]) -> int:
        """Number of tokens that all prompts begin with; 0 where a pass over them does not pay.

        It never does without an edit of prompts, which alone gives them a long beginning.
        """
        edits = self._base.edits
        if not (edits.active and edits.effects(RewritePrompt)):
            return 0
        prompts = [row.prompt for row in encoded]
        most = min(map(len, prompts)) - 1  # each prompt goes on
        if most < SHORTEST or any(row.images for row in encoded):
            return 0
        columns = zip(*(prompt[:most] for prompt in prompts), strict=True)
        count = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        held = self._key[1] if self._key is not None and self._key[0] == edits.ids else ()
        if held and prompts[0][: len(held)] == held and len(held) <= count <= 2 * len(held):
            return len(held)  # what is known already
        if len(prompts) == 1:
            return 0
        return count if count >= SHORTEST and can_resume(self._base) and self._expands else 0

    def cache(self, prefix: Sequence[int], rows: int) -> Any:
        """The cache of a beginning, for so many rows that go on from it."""
        edits = self._base.edits
        key = (edits.ids, tuple(prefix))
        if key != self._key:
            self._key, self._cache = key, self._filled(prefix)
        return expanded(self._cache, rows)

    @torch.no_grad()
    def _filled(self, prefix: Sequence[int]) -> Any:
        ids = torch.tensor([list(prefix)], device=self._base.device)
        mask = torch.ones_like(ids)
        options = {"use_cache": True, "logits_to_keep": 1}
        return self._base.model(input_ids=ids, attention_mask=mask, **options).past_key_values

    @cached_property
    def bears_gaps(self) -> bool:
        """Whether padding between a beginning and what follows it changes nothing.

        It does where a window of attention slides, which counts padding too.
        """
        if not attends_to_all(self._base):
            return False
        with self._base.edits.suspended():
            return self._tried()

    @torch.no_grad()
    def _tried(self) -> bool:
        """Compare a prompt behind a gap with the same one whole."""
        base = self._base
        size = int(base.model.config.get_text_config(decoder=True).vocab_size)
        ids = torch.tensor([[(7 * i + 3) % size for i in range(9)]], device=base.device)
        gap = torch.cat([ids[:, :6], ids[:, :3], ids[:, 6:]], dim=1)
        mask = torch.ones_like(gap)
        mask[:, 6:9] = 0
        whole = base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        options = {"position_ids": positions(mask)[:, 6:]} if base.takes_positions else {}
        cache = self._filled(ids[0, :6].tolist())
        behind = base.model(
            input_ids=gap[:, 6:], attention_mask=mask, past_key_values=cache, **options
        ).logits[0, -1]
        return bool((behind - whole).norm() <= SAME[base.dtype.itemsize] * whole.norm())

    @cached_property
    def _expands(self) -> bool:
        """Whether all that the model's cache holds is keys and values."""
        with self._base.edits.suspended():
            return holds_keys(self._filled((0, 1)))


def expanded(cache: Any, rows: int) -> Any:
    """A copy of a cache of one row for several; they share its memory until they go on."""
    twin = copied(cache)
    for layer in twin.layers:
        layer.keys = layer.keys.expand(rows, -1, -1, -1)
        layer.values = layer.values.expand(rows, -1, -1, -1)
    return twin
