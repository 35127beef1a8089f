"""Help of the commands, cached as text.

The parser needs all of Lightning, which takes three times as long to import as torch.  So help is
rendered once, and printed from the cache until something it depends on changes: a source file of
this package, an installed package, Python, or the width of the terminal.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from kedit_lightning.cache_folder import cache_dir
from kedit_lightning.registry import PLUGINS


def help_page(arguments: Sequence[str]) -> Path | None:
    """The file that caches the help which arguments ask for, whether it exists or not.

    Args:
        arguments: Arguments of the process.

    Returns:
        ``None`` if they ask for something else, or if plug-ins, whose sources may change, add to
        the help.
    """
    if len(arguments) != 2 or arguments[1] not in ("-h", "--help") or not arguments[0].isalpha():
        return None
    if entry_points(group=PLUGINS):
        return None
    width = shutil.get_terminal_size().columns
    return cache_dir() / "help" / f"{arguments[0]}-{width}-{_fingerprint()}.txt"


def _fingerprint() -> str:
    """Hash of the versions of all packages, and of size and time of this package's sources."""
    packages = {path.name for entry in sys.path for path in Path(entry).glob("*.dist-info")}
    callbacks = find_spec("kedit_lightning.callbacks")
    folders = [str(Path(__file__).parents[1]), *(callbacks.submodule_search_locations or ())]
    files = [path for folder in folders for path in Path(folder).rglob("*.py")]
    stats = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    allowed = os.environ.get("KEDIT_ALLOW_IMPORTS")
    text = repr((sys.version, sorted(packages), stats, allowed))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@contextmanager
def caching(page: Path | None) -> Iterator[None]:
    """Save what is printed inside as a page of help, if that ends well.

    Args:
        page: Its file; with ``None`` nothing is saved.
    """
    if page is None:
        yield
        return
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    except SystemExit as stop:
        if not stop.code:
            _save(page, text.getvalue())
        raise
    finally:
        sys.stdout.write(text.getvalue())


def _save(page: Path, text: str) -> None:
    temporary = page.with_suffix(f".{os.getpid()}")
    # In a folder that cannot be written to, help is rendered each time.
    with suppress(OSError):
        page.parent.mkdir(parents=True, exist_ok=True)
        for stale in page.parent.glob(f"{page.stem.rpartition('-')[0]}-*.txt"):
            stale.unlink()
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(page)
