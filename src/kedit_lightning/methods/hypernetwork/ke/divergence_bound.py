"""A bound on how far answers may drift, kept by a multiplier that learns with the networks."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning.methods.training.precision import FullPrecision


class DivergenceBound(FullPrecision):
    """Holds the multiplier ``λ`` and the margin ``m`` of ``min loss + λ (divergence - m)``.

    Both are buffers and change here only, in steps that are written out: ``λ`` after each training
    step, ``m`` after each validation.

    Args:
        margin: Divergence that is allowed to begin with.
        dtype: Number type of both.
    """

    #: A validation with a larger share of successful edits makes the margin smaller ...
    SUCCESS = 0.9
    #: ... by this factor.
    SHRINK = 0.8
    multiplier: Tensor
    margin: Tensor

    def __init__(self, margin: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("multiplier", torch.ones((), dtype=dtype))
        self.register_buffer("margin", torch.tensor(margin, dtype=dtype))

    @torch.no_grad()
    def ascend(self, divergence: Tensor, lr: float) -> None:
        """Step the multiplier up its gradient, ``divergence - m``; it never falls below 0.

        Args:
            divergence: Mean over the episodes of all ranks. Shape ``[]``.
            lr: Learning rate.
        """
        step = lr * (divergence.to(self.margin) - self.margin)
        self.multiplier.copy_((self.multiplier + step).clamp(min=0))

    @torch.no_grad()
    def tighten(self, success: float, floor: float) -> None:
        """Ask for less divergence once edits succeed.

        Args:
            success: Share of edits that a validation found successful.
            floor: Margin below which it does not go.
        """
        if success > self.SUCCESS:
            smaller = (self.margin * self.SHRINK).clamp(min=floor)
            self.margin.copy_(torch.minimum(self.margin, smaller))
