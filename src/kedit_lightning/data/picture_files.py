"""Pictures that records name: where they are, and whether they are there.

A picture is opened when a row about it is made, so that a data set needs no memory for pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError, MissingExtraError, article_list
from kedit_lightning.image_reference import Image, settled, video_of

#: Beginnings of references that are no paths.
_REMOTE = ("http://", "https://", "data:")


def picture(fields: Fields, key: str, folder: Path | None, setting: str = "") -> Image | None:
    """The picture that a field names, or the several of a list; ``None`` without one.

    Args:
        fields: The record.
        key: The field: a path or a URL, or a list of them.
        folder: Where relative paths start.
        setting: The setting that names this folder, if one does.

    Raises:
        InvalidRequestError: A file is not there.
    """
    names = fields.texts(key)
    if not names:
        return None
    return settled(located(names, folder, f"field '{fields.place(key)}'", setting))


def located(names: Sequence[str], folder: Path | None, what: str, setting: str = "") -> list[str]:
    """Paths of pictures from the folder they are relative to; URLs stay as they are.

    Args:
        names: Paths and URLs.
        folder: Where relative paths start.
        what: Where they stand, in messages.
        setting: The setting that names this folder, if one does.

    Raises:
        InvalidRequestError: Files are not there; the message names them all.
    """
    found, absent = [], []
    for name in names:
        if name.startswith(_REMOTE):
            found.append(name)
            continue
        video = video_of(name)
        if video is not None and find_spec("av") is None:
            raise MissingExtraError(
                f"{what} names video '{name}', whose frames need PyAV: pip install "
                "'kedit-lightning[vision]'; or give frames, a list of pictures"
            )
        file = name if video is None else video[0]
        path = (folder or Path()) / Path(file).expanduser()
        found.append(str(path) if video is None else f"{path}#frames={video[1]}")
        if not path.is_file():
            absent.append(f"'{path}'")
    if absent:
        start = "the folder that paths start from"
        if setting:
            start += f", {setting} (--data.{setting} FOLDER on the command line)"
        raise InvalidRequestError(
            f"{what} names {article_list(absent)}, which is no file; correct the path, or {start}"
        )
    return found
