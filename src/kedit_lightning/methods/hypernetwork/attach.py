"""Low-rank changes of projections that keep their autograd history.

An edit on the stack is data: its factors are detached.  While a hypernetwork learns, the loss after
the edit must reach the network, so the change is attached here for the length of a ``with`` block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kedit_lightning.base_models.taps import Visit, visiting
from kedit_lightning.edits.modules import compute_dtype


@dataclass(frozen=True)
class LowRankChange:
    """A change of one projection: its output becomes ``y + Σ_k b_k (a_k · x)``.

    Args:
        a: Shape ``[rank, d_in]``.
        b: Shape ``[rank, d_out]``.
        edits: Number of the edit that each of the terms belongs to. Shape ``[rank]``.
    """

    a: Tensor
    b: Tensor
    edits: Tensor


@contextmanager
def attached(
    model: nn.Module, changes: Mapping[str, LowRankChange], edit_of_row: Tensor
) -> Iterator[None]:
    """Inside, each row of a batch runs through the model with an edit of its own.

    The gradients are those of writing the dense change into the weight, which is never built.

    Args:
        model: The model.
        changes: Changes by module name.
        edit_of_row: Number of the edit that each row carries. Shape ``[batch]``.
    """

    def visit(change: LowRankChange) -> Visit:
        own = edit_of_row[:, None].to(change.edits.device) == change.edits[None]
        mask = None if bool(own.all()) else own[:, None]  # [batch, 1, rank]

        def add(x: Tensor, y: Tensor) -> Tensor:
            dtype = compute_dtype(y.dtype)
            with torch.autocast(y.device.type, enabled=False):
                a, b = (factor.to(y.device, dtype) for factor in (change.a, change.b))
                weights = x.to(dtype) @ a.T
                if mask is not None:
                    weights = weights * mask.to(weights)
                return (y.to(dtype) + weights @ b).to(y.dtype)

        return add

    with visiting(model, {name: visit(change) for name, change in changes.items()}):
        yield
