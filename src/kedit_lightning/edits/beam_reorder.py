"""How the row context of a call stays with the key-value cache that it has filled."""

from __future__ import annotations

import copy
import weakref
from typing import Any, Protocol

from torch import Tensor


class KeptRows(Protocol):
    """What a cache keeps of the rows of a call."""

    columns: int

    def reorder(self, beam_index: Tensor) -> None:
        """Reorder rows as beam search does. Shape ``[batch]``."""


class BeamReorder:
    """Replaces a cache's ``reorder_cache``, so that the row context follows the beams."""

    def __init__(self, cache: Any, context: KeptRows) -> None:
        # A strong reference would be a cycle, and keep the cache alive after its answer.
        self._cache = weakref.ref(cache)
        self.context = context

    def __call__(self, beam_idx: Tensor) -> Any:
        """Reorder the rows of the cache, and those of the context."""
        cache: Any = self._cache()
        self.context.reorder(beam_idx)
        return type(cache).reorder_cache(cache, beam_idx)

    def __deepcopy__(self, memo: dict[int, Any]) -> BeamReorder:
        # The cache is being copied: ``memo`` holds the copy already.
        return BeamReorder(memo[id(self._cache())], copy.deepcopy(self.context, memo))


def context_of(cache: Any) -> Any:
    """The row context of the call that has filled a cache, ``None`` where it has none."""
    reorder = vars(cache).get("reorder_cache")
    return reorder.context if isinstance(reorder, BeamReorder) else None


def columns_in(cache: Any) -> int:
    """Columns that a cache holds: of a state-space model, which counts none, those read so far."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:
        known = context_of(cache)
        filled = bool(cache.has_previous_state())
        return max(1, known.columns if known is not None else 1) if filled else 0
