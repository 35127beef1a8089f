"""Frames of videos, decoded by PyAV where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from kedit_lightning.errors import InvalidRequestError, MissingExtraError


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """A container and its first video stream."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError(
            f"frames of '{path}' need PyAV: pip install 'kedit-lightning[vision]'; or give frames, "
            "a list of pictures"
        ) from error
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise InvalidRequestError(f"'{path}' holds no video; give one, or pictures")
            yield container, container.streams.video[0]
    except (OSError, av.FFmpegError) as error:
        raise InvalidRequestError(
            f"video '{path}' cannot be read ({error}); give another, or a list of pictures"
        ) from error


def video_size(path: str) -> tuple[int, int]:
    """Width and height of a video, from the beginning of its file."""
    with _opened(path) as (_, stream):
        return stream.width, stream.height


def video_frame(path: str, number: int, count: int) -> Image.Image:
    """One of ``count`` frames that are spread evenly over a video.

    Raises:
        MissingExtraError: PyAV is not installed.
        InvalidRequestError: The file is no video.
    """
    return _frames(path, Path(path).stat().st_mtime_ns, count)[number]


# The frames of one video are asked for one after another.
@lru_cache(maxsize=2)
def _frames(path: str, changed: int, count: int) -> tuple[Image.Image, ...]:
    with _opened(path) as (container, stream):
        # Not all files say how many frames they hold.
        total = stream.frames or sum(1 for _ in container.decode(stream))
    wanted = chosen_frames(total, count)
    with _opened(path) as (container, stream):
        found = {
            at: frame.to_image()
            for at, frame in zip(range(wanted[-1] + 1), container.decode(stream), strict=False)
            if at in wanted
        }
    last = found[max(found)]  # a file may hold fewer than it says
    return tuple(found.get(at, last) for at in wanted)


def chosen_frames(total: int, count: int) -> list[int]:
    """Numbers of frames in the middle of ``count`` equal parts of a video.

    >>> chosen_frames(10, 2), chosen_frames(1, 3)
    ([2, 7], [0, 0, 0])
    """
    return [(2 * part + 1) * max(1, total) // (2 * count) for part in range(count)]
