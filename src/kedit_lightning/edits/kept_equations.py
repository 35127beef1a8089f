"""What least-squares edits were solved from, which a ledger keeps beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_KEPT = ContextVar("kept", default=False)


@contextmanager
def equations_kept() -> Iterator[None]:
    """Inside, methods that can solve an edit again put what that takes into ``edit.equations``."""
    before = _KEPT.set(True)
    try:
        yield
    finally:
        _KEPT.reset(before)


def keeps_equations() -> bool:
    """Whether what an edit is solved from is wanted."""
    return _KEPT.get()
