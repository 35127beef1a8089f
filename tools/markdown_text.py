"""Text as Markdown shows it."""

from __future__ import annotations

import re


def escaped(text: str) -> str:
    """The text with a backslash before what Markdown would read as a mark."""
    return re.sub(r"([\[\]|<>*_])", r"\\\1", text)
