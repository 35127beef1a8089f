"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of the cache: ``KEDIT_CACHE``, or ``~/.cache/kedit-lightning``; made when needed."""
    named = os.environ.get("KEDIT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "kedit-lightning"
