"""Weight deltas that stay differentiable while they are attached to a model.

An edit on the stack is data: its factors are detached.  While a hypernetwork is trained, the loss
of the edited model must reach the network, so the delta is attached here with a forward hook, for
the length of a ``with`` block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kedit_lightning.base_models.taps import Visit, visiting
from kedit_lightning.edits import LowRankDelta
from kedit_lightning.edits.projections import compute_dtype

#: A delta ``Δ`` of one weight: its low-rank factors, or the matrix itself, ``[d_out, d_in]``.
Delta: TypeAlias = LowRankDelta | Tensor


@contextmanager
def attached(
    model: nn.Module,
    deltas: Mapping[str, Delta],
    edit_of_row: Tensor,
    edit_of_term: Mapping[str, Tensor],
) -> Iterator[None]:
    """Add deltas to the outputs of projections, where each row of a batch carries its own edit.

    The gradients are those of adding the dense delta to the weight, which is never built.

    Args:
        model: The model.
        deltas: Deltas by module name, those of all edits of the batch together.
        edit_of_row: Number of the edit that each row carries. Shape ``[batch]``.
        edit_of_term: Number of the edit that each rank-one term of a low-rank delta belongs to, by
            module name. Shape ``[rank]`` each. Where absent, every row carries all terms.
    """

    def visit(name: str, delta: Delta) -> Visit:
        factors = (delta,) if isinstance(delta, Tensor) else (delta.a, delta.b)
        mask = _mask(edit_of_term.get(name), edit_of_row)

        def add(x: Tensor, y: Tensor) -> Tensor:
            dtype = compute_dtype(y.dtype)
            with torch.autocast(y.device.type, enabled=False):
                first, *rest = (factor.to(y.device, dtype) for factor in factors)
                change = x.to(dtype) @ first.T
                if mask is not None:
                    change = change * mask.to(change)
                for second in rest:
                    change = change @ second.T
                return (y.to(dtype) + change).to(y.dtype)

        return add

    with visiting(model, {name: visit(name, delta) for name, delta in deltas.items()}):
        yield


def _mask(edit_of_term: Tensor | None, edit_of_row: Tensor) -> Tensor | None:
    """The terms of each row's edit, ``[batch, 1, rank]``; ``None`` where rows carry all terms."""
    if edit_of_term is None:
        return None
    mask = edit_of_row[:, None].to(edit_of_term.device) == edit_of_term[None]
    return None if bool(mask.all()) else mask[:, None]
