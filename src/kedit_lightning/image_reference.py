"""References to pictures: paths and URLs as they are, pictures in memory as data URLs.

Requests and probes are text, so that they can be hashed, compared and written to files.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

from kedit_lightning.errors import InvalidRequestError

#: One picture, or several in the order of their places in the prompt.
Image: TypeAlias = str | tuple[str, ...]
#: What is taken for a picture: a path, a URL, the bytes of a file, or a Pillow image.
ImageSource: TypeAlias = str | PathLike[str] | bytes | Any


def references(image: Image | None) -> tuple[str, ...]:
    """The references in a field, none without one.

    >>> references(None), references("a.png"), references(("a.png", "b.png"))
    ((), ('a.png',), ('a.png', 'b.png'))
    """
    if image is None:
        return ()
    return (image,) if isinstance(image, str) else tuple(image)


def as_they_are(images: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
    """References with the time of change and the size of files, as keys of what is made of them."""
    found = []
    for reference in images:
        time = size = 0
        with suppress(OSError, ValueError):
            state = Path(reference).stat()
            time, size = state.st_mtime_ns, state.st_size
        found.append((reference, time, size))
    return tuple(found)


def content_hash(reference: str) -> str:
    """Hash of the picture behind a reference; of the reference itself where that is no file."""
    content = reference.encode()
    with suppress(OSError, ValueError):  # a data URL is too long for a file's name
        content = Path(reference).read_bytes()
    return hashlib.sha256(content).hexdigest()[:24]


def settled(image: ImageSource | Sequence[ImageSource] | None) -> Image | None:
    """The one spelling of what was given for a picture, or for several.

    >>> settled(["a.png"]), settled(["a.png", "b.png"])
    ('a.png', ('a.png', 'b.png'))

    Raises:
        InvalidRequestError: It is none of these, or a list without any.
    """
    if not isinstance(image, (list, tuple)):
        return None if image is None else _reference(image)
    if not image:
        raise InvalidRequestError("is an empty list; leave it out, or name a picture")
    found = tuple(_reference(one) for one in image)
    return found[0] if len(found) == 1 else found


def _reference(image: ImageSource) -> str:
    if isinstance(image, PathLike):
        return str(fspath(image))
    if isinstance(image, str):
        if not image.strip():
            raise InvalidRequestError(f"must be text that is not empty, got {image!r}")
        return image
    if isinstance(image, bytes):
        return _data_url(image)
    if type(image).__module__.partition(".")[0] == "PIL" and hasattr(image, "save"):
        file = BytesIO()
        image.save(file, format="PNG")
        return _data_url(file.getvalue())
    raise InvalidRequestError(
        f"must be text (a path or a URL), bytes, a Pillow image or a list of these, got {image!r}"
    )


def _data_url(content: bytes) -> str:
    return f"data:image/*;base64,{base64.b64encode(content).decode()}"
