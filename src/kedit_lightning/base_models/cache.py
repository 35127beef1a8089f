"""Folder of the cache."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``KEDIT_CACHE``, or ``~/.cache/kedit-lightning``: files that can be computed again."""
    named = os.environ.get("KEDIT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "kedit-lightning"
