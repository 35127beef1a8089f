"""Changes of a projection, one for each row of a pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowDelta:
    """Changes of one projection, one for each row of a pass.

    Args:
        dense: Transposed, as gradients come out of the product. Shape ``[batch, d_in, d_out]``.
        bias: Shape ``[batch, d_out]``.
    """

    dense: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the changes to ``y`` of shape ``[batch, tokens, d_out]``, in at least float32."""
        change = x.to(self.dense.dtype) @ self.dense
        if self.bias is not None:
            change = change + self.bias[:, None]
        return (y.to(change.dtype) + change).to(y.dtype)
