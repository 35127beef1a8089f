"""Modules whose number types precision plugins do not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class FullPrecision(nn.Module):
    """A module whose tensors move between devices but keep their number types.

    Precision plugins turn a module's parameters and buffers into 16 bit, where a counter stops at
    256 and small steps of an optimizer vanish.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.detach().new_empty(0)).device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]
