"""Passages of plain text that have nothing to do with the facts of a run."""

from __future__ import annotations

import random
from importlib.resources import files
from pathlib import Path

from kedit_lightning.errors import DataFileError, DataFileNotFoundError

#: Passages that are read, and the most words of each.
PASSAGES, LONGEST = 64, 80


def passages_of(path: Path | None = None, seed: int = 0) -> list[str]:
    """The passages of a text file, one a line, or those that come with the package.

    Of more than 64 with at least four words, the seed draws 64, in the order of the file.

    Raises:
        DataFileNotFoundError: There is no such file.
        DataFileError: It has no passage.
    """
    if path is None:
        text = files("kedit_lightning.data.text").joinpath("canary.txt").read_text("utf-8")
    elif not path.is_file():
        raise DataFileNotFoundError(
            f"'{path}' is no file; name a text file with a passage a line, or leave it out to use "
            "the packaged one"
        )
    else:
        text = path.read_text("utf-8", errors="replace")
    found = [line.split()[:LONGEST] for line in text.splitlines()]
    lines = [" ".join(words) for words in found if len(words) > 3]
    if not lines:
        raise DataFileError(f"'{path}' has no passage of at least four words; give it one a line")
    kept = sorted(random.Random(seed).sample(range(len(lines)), min(PASSAGES, len(lines))))
    return [lines[index] for index in kept]


def halved(passage: str) -> tuple[str, str]:
    """The first and the second half of the words of a passage.

    >>> halved("a b c d e")
    ('a b', 'c d e')
    """
    words = passage.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])
