"""The folder of cached files, which can all be computed again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of the cache: ``KEDIT_CACHE``, or ``~/.cache/kedit-lightning``; it need not exist."""
    folder = os.environ.get("KEDIT_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "kedit-lightning"
