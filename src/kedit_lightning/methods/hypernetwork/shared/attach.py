"""Changes of projections that keep their autograd history.

An edit on the stack is data: its factors are detached.  While a hypernetwork learns, the loss after
the edit must reach the network, so the change is attached here for the length of a ``with`` block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kedit_lightning.base_models.taps import Visit, visiting
from kedit_lightning.edits.projections import compute_dtype


@dataclass(frozen=True)
class LowRankChange:
    """A change of one projection: its output becomes ``y + Σ_k b_k (a_k · x)``.

    Without ``edits``, every row of a batch carries all of it.

    Args:
        a: Shape ``[rank, d_in]``.
        b: Shape ``[rank, d_out]``.
        edits: Number of the edit that each of the terms belongs to. Shape ``[rank]``.
    """

    a: Tensor
    b: Tensor
    edits: Tensor | None = None


@dataclass(frozen=True)
class DenseChange:
    """A change of one projection, alike for all rows: its output becomes ``y + x S``.

    Args:
        shift: ``S``. Shape ``[d_in, d_out]``.
    """

    shift: Tensor


Change: TypeAlias = LowRankChange | DenseChange


@contextmanager
def attached(
    model: nn.Module, changes: Mapping[str, Change], edit_of_row: Tensor
) -> Iterator[None]:
    """Inside, each row of a batch runs through the model with an edit of its own.

    The gradients are those of writing the dense change into the weight, which is never built.

    Args:
        model: The model.
        changes: Changes by module name.
        edit_of_row: Number of the edit that each row carries. Shape ``[batch]``.
    """

    def visit(change: Change) -> Visit:
        parts = (change.shift,) if isinstance(change, DenseChange) else (change.a.T, change.b)
        mask = None if isinstance(change, DenseChange) else _mask(change, edit_of_row)

        def add(x: Tensor, y: Tensor) -> Tensor:
            dtype = compute_dtype(y.dtype)
            with torch.autocast(y.device.type, enabled=False):
                first, *rest = (part.to(y.device, dtype) for part in parts)
                added = x.to(dtype) @ first
                if mask is not None:
                    added = added * mask.to(added)
                for second in rest:
                    added = added @ second
                return (y.to(dtype) + added).to(y.dtype)

        return add

    with visiting(model, {name: visit(change) for name, change in changes.items()}):
        yield


def _mask(change: LowRankChange, edit_of_row: Tensor) -> Tensor | None:
    """Which terms each row carries, ``[batch, 1, rank]``; ``None`` where all carry all."""
    if change.edits is None:
        return None
    own = edit_of_row[:, None].to(change.edits.device) == change.edits[None]
    return None if bool(own.all()) else own[:, None]
