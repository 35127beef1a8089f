"""How far two hidden states of one prompt may lie apart."""

from __future__ import annotations

import torch
from torch import Tensor

#: Relative to the norm of a state. Padding and the size of a batch move the input of an MLP's last
#: projection by up to 8e-16, 1e-6, 2e-3 and 8e-3 of it in models of six blocks, while prompts that
#: differ in one word are 3e-2 or more apart.
STATE_ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}


def state_rounding(dtype: torch.dtype) -> float:
    """Relative distance up to which states of a model of this dtype count as equal."""
    return STATE_ROUNDING.get(dtype, STATE_ROUNDING[torch.bfloat16])


def indistinct(distances: Tensor, states: Tensor, rounding: float) -> Tensor:
    """Whether states are at a distance that rounding explains.

    Args:
        distances: Shape ``[..., n]``.
        states: Shape ``[n, d]``.
        rounding: Relative to their norms, from :func:`state_rounding`.
    """
    reach: Tensor = rounding * states.norm(dim=-1)
    return distances <= reach
