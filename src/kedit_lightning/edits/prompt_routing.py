"""Row functions that decide at the last prompt token, and act from there on."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeAlias

import torch
from torch import Tensor

from kedit_lightning.edits.effects import RowFunction
from kedit_lightning.edits.row_context import RowContext

#: Inputs of a module at the last prompt tokens, ``[batch, d_in]`` -> a decision for each row.
Route: TypeAlias = Callable[[Tensor], Tensor]
#: Input and output of a module ``[batch, tokens, width]``, the decisions, and the columns of the
#: last prompt tokens, ``None`` in decode steps -> the new output.
Act: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def routed(family: Hashable, route: Route, act: Act) -> RowFunction:
    """A row function that routes each row once, at prefill, and acts on it until its answer ends.

    Args:
        family: Name of the decision in the row context.
        route: The decision.
        act: What is done to the rows.
    """

    def consult(x: Tensor, y: Tensor, context: RowContext) -> Tensor:
        end = context.prompt_end.to(x.device) if context.prefill else None
        if end is not None:
            context.decisions[family] = route(at_columns(x, end))
        if family not in context.decisions:  # applied in the middle of an answer
            return y
        return act(x, y, context.decisions[family], end)

    return consult


def at_columns(states: Tensor, columns: Tensor) -> Tensor:
    """States at one column of each row, ``[batch, width]``, of ``[batch, tokens, width]``."""
    return states[torch.arange(len(states), device=states.device), columns.to(states.device)]


def from_prompt_end(old: Tensor, new: Tensor, end: Tensor | None) -> Tensor:
    """The old states before the last prompt token, and the new ones from there on.

    Args:
        old: Shape ``[batch, tokens, width]``.
        new: The same.
        end: Column of the last prompt token, ``[batch]``; ``None`` in decode steps.
    """
    if end is None:
        return new
    columns = torch.arange(old.shape[1], device=old.device)
    return torch.where((columns >= end.to(old.device)[:, None])[..., None], new, old)


def put_rows(output: Tensor, rows: Tensor, new: Tensor, end: Tensor | None) -> Tensor:
    """An output whose rows ``[n]`` are new from their last prompt token on.

    Other rows, and earlier tokens, stay as they are to the last bit.

    Args:
        output: Shape ``[batch, tokens, width]``.
        rows: Numbers of the rows that change.
        new: Their new states. Shape ``[n, tokens, width]``.
        end: Column of the last prompt token of all rows, ``[batch]``; ``None`` in decode steps.
    """
    ends = None if end is None else end[rows.to(end.device)]
    return output.index_copy(0, rows, from_prompt_end(output[rows], new.to(output.dtype), ends))
