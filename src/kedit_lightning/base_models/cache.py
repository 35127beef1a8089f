"""Where results that are worth keeping between runs are stored."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """A folder of the cache: below ``$KEDIT_CACHE``, or else ``~/.cache/kedit-lightning``."""
    root = os.environ.get("KEDIT_CACHE") or Path.home() / ".cache" / "kedit-lightning"
    return Path(root).expanduser().joinpath(*parts)
