"""The folder of cached files, which can all be computed again, and that of ``facts-30m``."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of the cache: ``KEDIT_CACHE``, or ``~/.cache/kedit-lightning``; it need not exist."""
    folder = os.environ.get("KEDIT_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "kedit-lightning"


def facts_30m_dir() -> Path:
    """Folder of ``facts-30m``, model and facts: ``KEDIT_FACTS_30M``, or one in the cache."""
    folder = os.environ.get("KEDIT_FACTS_30M")
    return Path(folder).expanduser() if folder else cache_dir() / "facts-30m"


def where_facts_30m_is() -> str:
    """What to do where the folder is not there, as the end of a message."""
    return (
        "the scripts of tools/facts_30m make it (see their README); "
        f"put its folder at '{facts_30m_dir()}', or name it in the variable KEDIT_FACTS_30M"
    )
