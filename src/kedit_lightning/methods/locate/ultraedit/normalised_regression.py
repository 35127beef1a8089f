"""UltraEdit's arithmetic: gradients of tokens, normalised and regressed into a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning.edits import LowRankDelta
from kedit_lightning.methods.locate.shared.least_squares import ridge_update, size_prior
from kedit_lightning.methods.shared.moments import Moments

#: A column whose standard deviation is below this share of its mean counts as constant: the rest is
#: rounding, in half precision inputs as well, since those are exact in float64.
_CONSTANT = 1e-10


def normalised(rows: Tensor, statistics: Moments) -> Tensor:
    """Rows with mean 0 and standard deviation 1, column by column; constant columns become 0.

    The result does not change when rows and statistics are scaled together.

    Args:
        rows: Shape ``[n, width]``.
        statistics: Moments of all rows seen, these among them.

    Returns:
        Shape ``[n, width]``.
    """
    mean, squares, count = statistics
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    varies = deviation > _CONSTANT * mean.abs()
    return torch.where(varies, (rows - mean) / torch.where(varies, deviation, 1), 0)


def regress_normalised(
    inputs: Tensor, gradients: Tensor, statistics: Moments, lr: float
) -> LowRankDelta:
    """The change of a weight that moves each token's output against its normalised gradient.

    ``V' = -lr · ‖ĥ‖² · v̂`` and ``Δᵀ = (HᵀH + I)⁻¹ HᵀV'``, with hats for normalised rows and ``H``
    as it is (Gu et al. 2025, "UltraEdit"): the change that comes closest to the wanted moves in
    ridge regression.  It is solved in the smaller of the two dimensions.

    Args:
        inputs: ``H``, what the projection received. Shape ``[n, d_in]``.
        gradients: ``V``, of the loss with respect to its output. Shape ``[n, d_out]``.
        statistics: Moments of ``[H | V]`` over all tokens so far, these among them.
        lr: Learning rate.

    Returns:
        ``Δ`` of rank ``min(n, d_in)``, float64.
    """
    inputs, gradients = inputs.double(), gradients.double()
    both = normalised(torch.cat([inputs, gradients], dim=1), statistics)
    keys, values = both.split([inputs.shape[1], gradients.shape[1]], dim=1)
    moves = -lr * keys.square().sum(1, keepdim=True) * values
    if len(inputs) > inputs.shape[1]:
        # HᵀH = RᵀR and HᵀV' = Rᵀ(QᵀV'): R may stand for H.
        basis, inputs = torch.linalg.qr(inputs)
        moves = basis.T @ moves
    return ridge_update(inputs.T, moves.T, size_prior(), eps=1.0)
