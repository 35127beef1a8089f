"""Choice of layers in models whose blocks differ: some lack an MLP, some have no attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

from kedit_lightning.base_models.layout import Layout
from kedit_lightning.errors import ModuleNotLocatedError


def nearest_layers(
    known: Sequence[int], wished: Iterable[int], fits: Callable[[int], bool] | None = None
) -> tuple[int, ...]:
    """Of the known layers those nearest to the wished ones, each once, in order.

    Of two at one distance it is the earlier.  ``fits`` is asked of the nearest first, and only as
    often as needed; layers that do not fit are passed over.

    >>> nearest_layers([0, 2, 4], [1, 2]), nearest_layers([0, 2, 4], [1, 2], lambda i: i > 2)
    ((0, 2), (4,))
    """
    test = cache(fits or (lambda layer: True))
    ordered = [sorted(known, key=lambda layer: (abs(layer - i), layer)) for i in wished]
    found = (next(filter(test, layers), None) for layers in ordered)
    return tuple(sorted({layer for layer in found if layer is not None}))


def nearest_attending_layers(layout: Layout, wished: Iterable[int]) -> tuple[int, ...]:
    """The layers nearest to the wished ones that mix tokens before a dense MLP of their own.

    Raises:
        ModuleNotLocatedError: No block does both.
    """

    def attends(layer: int) -> bool:
        try:
            return bool(layout.attention(layer))
        except ModuleNotLocatedError:
            return False

    if found := nearest_layers(layout.dense_layers, wished, attends):
        return found
    raise ModuleNotLocatedError(
        f"no block of model type '{layout.model_type}' has both attention and a dense MLP behind "
        "it, so values of the two cannot be optimised together; use MEMIT, which needs no attention"
    )
