"""What hooks need to know about the rows of a forward pass.

Memory edits decide per row, at the last prompt token, whether they act.  The decision is taken
while the key-value cache is empty and kept for the rest of the answer.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class RowContext:
    """State of the rows that are being answered.

    Args:
        prompt_end: Column of the last prompt token of each row. Shape ``[batch]``.
        prefill: Whether the key-value cache is empty, so that the prompt itself passes through.
        decisions: What memory edits decided at prefill, by module; rows in the first dimension.
    """

    prompt_end: Tensor
    prefill: bool = True
    decisions: dict[Hashable, Tensor] = field(default_factory=dict)

    def reorder(self, beam_index: Tensor) -> None:
        """Follow rows that beam search has moved."""
        for key, decision in self.decisions.items():
            self.decisions[key] = decision.index_select(0, beam_index.to(decision.device))


def last_attended(attention_mask: Tensor) -> Tensor:
    """Column of the last token that is no padding. Shape ``[batch]`` from ``[batch, tokens]``."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (columns * (attention_mask != 0)).argmax(dim=1)


def _cached_tokens(cache: Any) -> int:
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2])


class ContextTracker:
    """Keeps the row context of a model's calls, as a forward pre-hook of the model.

    Callers that know where prompts end (rows with teacher-forced answers) set ``given`` first;
    otherwise the prompt is taken to end at the last attended token of the prefill.
    """

    def __init__(self) -> None:
        self.given: Tensor | None = None
        self.current: RowContext | None = None

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open a context at prefill, and mark decode steps."""
        cache = kwargs.get("past_key_values")
        if _cached_tokens(cache) > 0 and self.current is not None:
            self.current.prefill = False
            return
        if self.given is not None:
            self.current = RowContext(self.given)
        else:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is None:
                ids = kwargs["inputs_embeds"][..., 0]
            mask = kwargs.get("attention_mask")
            if mask is None or mask.dim() != 2:
                mask = torch.ones(ids.shape[:2], device=ids.device)
            self.current = RowContext(last_attended(mask[:, -ids.shape[1] :]))
        if hasattr(cache, "reorder_cache"):
            self._follow_beams(cache, self.current)

    @staticmethod
    def _follow_beams(cache: Any, context: RowContext) -> None:
        original = cache.reorder_cache

        def reorder(beam_idx: Tensor) -> Any:
            context.reorder(beam_idx)
            return original(beam_idx)

        cache.reorder_cache = reorder
