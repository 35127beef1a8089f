"""The constraint of KnowledgeEditor: a bound on divergence with a Lagrange multiplier."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning.methods.training.trained_network import FullPrecision


class DivergenceBound(FullPrecision):
    """The multiplier ``λ`` and the margin ``m`` of ``min loss + λ (divergence - m)``.

    Both are buffers: ``λ`` changes after each training step, ``m`` after each validation.
    """

    #: The margin shrinks after a validation with a larger share of successful edits ...
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
        """Dual ascent: step the multiplier along its gradient ``divergence - m``; never below 0."""
        step = lr * (divergence.to(self.margin) - self.margin)
        self.multiplier.copy_((self.multiplier + step).clamp(min=0))

    @torch.no_grad()
    def tighten(self, success: float, floor: float) -> None:
        """Shrink the margin, down to a floor, by the share of successful edits of a validation."""
        if success > self.SUCCESS:
            smaller = (self.margin * self.SHRINK).clamp(min=floor)
            self.margin.copy_(torch.minimum(self.margin, smaller))
