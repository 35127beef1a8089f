"""References to pictures: paths and URLs as they are, pictures in memory as data URLs.

Requests and probes are text, so that they can be hashed, compared and written to files.  A video
stands for some of its frames, spread evenly, whose references name file and frame.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

from kedit_lightning.errors import InvalidRequestError

#: One picture, or several in the order of their places in the prompt.
Image: TypeAlias = str | tuple[str, ...]
#: What is taken for a picture: a path, a URL, the bytes of a file, or a Pillow image.
ImageSource: TypeAlias = str | PathLike[str] | bytes | Any

#: Endings of names of videos, and the number of frames that stand for one.
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
FRAMES = 8
_FRAME = re.compile(r"(.+)#frame=(\d+)/(\d+)", re.DOTALL)
_COUNTED = re.compile(r"(.+)#frames=(\d+)", re.DOTALL)


def video_of(name: str) -> tuple[str, int] | None:
    """File and number of frames of a reference to a video; ``None`` for other references.

    >>> video_of("a.mp4"), video_of("a.mp4#frames=2"), video_of("a.png")
    (('a.mp4', 8), ('a.mp4', 2), None)
    """
    counted = _COUNTED.fullmatch(name)
    path, count = (counted[1], int(counted[2])) if counted else (name, FRAMES)
    return (path, max(1, count)) if path.lower().endswith(VIDEOS) else None


def frame_of(reference: str) -> tuple[str, int, int] | None:
    """File, number and count of a reference to a frame; ``None`` for other references.

    >>> frame_of("a.mp4#frame=0/8"), frame_of("a.png")
    (('a.mp4', 0, 8), None)
    """
    found = None if reference.startswith("data:") else _FRAME.fullmatch(reference)
    return (found[1], int(found[2]), int(found[3])) if found else None


def _file(reference: str) -> Path:
    """The file behind a reference, if it is one."""
    frame = frame_of(reference)
    return Path(reference if frame is None else frame[0])


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
            state = _file(reference).stat()
            time, size = state.st_mtime_ns, state.st_size
        found.append((reference, time, size))
    return tuple(found)


class PictureHashes(tuple[str, ...]):
    """Hashes of the contents of pictures, with the references that they were made of."""

    references: tuple[str, ...] = ()

    @classmethod
    def of(cls, references: Sequence[str]) -> PictureHashes:
        """The hashes of some pictures."""
        hashes = cls(map(content_hash, references))
        hashes.references = tuple(references)
        return hashes


def content_hash(reference: str) -> str:
    """Hash of the picture behind a reference; of the reference itself where that is no file."""
    if reference.startswith("data:"):
        return _digest(reference.encode())
    return _hash_of(*as_they_are((reference,))[0])


# Each probe about a picture asks for it, and the frames of a video are of one large file.
@lru_cache(maxsize=4096)
def _hash_of(reference: str, time: int, size: int) -> str:
    """The hash of a file that has been changed at a time, and has a size."""
    content = reference.encode()
    with suppress(OSError, ValueError):  # a reference may be too long for a file's name
        frame = frame_of(reference)
        content = _file(reference).read_bytes() + str(frame[1:] if frame else "").encode()
    return _digest(content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def settled(image: ImageSource | Sequence[ImageSource] | None) -> Image | None:
    """The one spelling of what was given for a picture, or for several.

    >>> settled(["a.png"]), settled(["a.png", "b.png"]), settled("a.mp4#frames=2")
    ('a.png', ('a.png', 'b.png'), ('a.mp4#frame=0/2', 'a.mp4#frame=1/2'))

    Raises:
        InvalidRequestError: It is none of these, or a list without any.
    """
    if image is None:
        return None
    given = image if isinstance(image, (list, tuple)) else [image]
    if not given:
        raise InvalidRequestError("is an empty list; leave it out, or name a picture")
    found = tuple(one for source in given for one in _frames(_reference(source)))
    return found[0] if len(found) == 1 else found


def _frames(reference: str) -> list[str]:
    """The frames that stand for a video; another reference as it is."""
    video = None if reference.startswith("data:") else video_of(reference)
    if video is None:
        return [reference]
    path, count = video
    return [f"{path}#frame={number}/{count}" for number in range(count)]


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
