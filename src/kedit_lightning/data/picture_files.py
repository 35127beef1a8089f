"""Pictures that records name: where they are, and whether they are there.

A picture is opened when a row about it is made, so that a data set needs no memory for pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError, article_list
from kedit_lightning.image_reference import Image, settled

#: Beginnings of references that are no paths.
_REMOTE = ("http://", "https://", "data:")


def picture(fields: Fields, key: str, folder: Path | None) -> Image | None:
    """The picture that a field names, or the several of a list; ``None`` without one.

    Args:
        fields: The record.
        key: The field: a path or a URL, or a list of them.
        folder: Where relative paths start.

    Raises:
        InvalidRequestError: A file is not there.
    """
    names = fields.texts(key)
    if not names:
        return None
    return settled(located(names, folder, f"field '{fields.place(key)}'"))


def located(names: Sequence[str], folder: Path | None, what: str) -> list[str]:
    """Paths of pictures from the folder they are relative to; URLs stay as they are.

    Raises:
        InvalidRequestError: Files are not there; the message names them all.
    """
    found, absent = [], []
    for name in names:
        if name.startswith(_REMOTE):
            found.append(name)
            continue
        path = (folder or Path()) / Path(name).expanduser()
        found.append(str(path))
        if not path.is_file():
            absent.append(f"'{path}'")
    if absent:
        raise InvalidRequestError(
            f"{what} names {article_list(absent)}, which is no file; correct the path, or the "
            "folder that paths start from"
        )
    return found
