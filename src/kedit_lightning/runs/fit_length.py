"""How long a fit may go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def at_most(fit_loop: Any, epochs: int | None) -> Iterator[None]:
    """Inside, limit a fit whose length its method knows, so that Lightning does not take 1000.

    Args:
        fit_loop: Lightning's loop over epochs.
        epochs: Passes over the data; as many as the trainer says when ``None``.
    """
    asked = fit_loop.max_epochs
    if epochs is not None and (asked is None or asked > epochs):
        fit_loop.max_epochs = epochs
    try:
        yield
    finally:
        fit_loop.max_epochs = asked
