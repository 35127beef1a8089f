"""Help of the commands, cached as text.

The parser imports all of Lightning, which takes seconds.  So help is rendered once, and printed
from the cache until a source file of this package, an installed package, Python, or the width of
the terminal changes.
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

#: Options that show help, with what they add to the name of its page.
_FORMS = {"-h": "", "--help": "", "--help-all": "_all"}


def help_page(arguments: Sequence[str]) -> Path | None:
    """The cache file of a command's help, whether it exists or not.

    There is none if arguments ask for something else, or if there are plug-ins, which may change.
    """
    is_help = len(arguments) == 2 and arguments[1] in _FORMS and arguments[0].isalpha()
    if not is_help or entry_points(group=PLUGINS):
        return None
    name, width = arguments[0] + _FORMS[arguments[1]], shutil.get_terminal_size().columns
    return cache_dir() / "help" / f"{name}-{width}-{_fingerprint()}.txt"


def _fingerprint() -> str:
    """Hash of the versions of all packages, and of size and time of this package's sources."""
    packages = {path.name for entry in sys.path for path in Path(entry).glob("*.dist-info")}
    callbacks = find_spec("kedit_lightning.callbacks")  # a folder of its own in a checkout
    assert callbacks is not None
    folders = {Path(__file__).parents[1], *map(Path, callbacks.submodule_search_locations or ())}
    files = {path: path.stat() for folder in folders for path in folder.rglob("*.py")}
    stats = sorted((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files.items())
    text = repr((sys.version, sorted(packages), stats, os.environ.get("KEDIT_ALLOW_IMPORTS")))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def saved_help(page: Path) -> str:
    """The text of a page; empty if it was not saved yet or cannot be read."""
    with suppress(OSError):
        return page.read_text(encoding="utf-8")
    return ""


@contextmanager
def caching(page: Path | None) -> Iterator[None]:
    """Save what is printed inside to a page, unless it is ``None`` or the command fails."""
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
    with suppress(OSError):  # where nothing can be written, help is rendered each time
        page.parent.mkdir(parents=True, exist_ok=True)
        for stale in page.parent.glob(f"{page.stem.rpartition('-')[0]}-*.txt"):
            stale.unlink()
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(page)
