"""Facts of driving scenes in pictures and videos (ADS-Edit, Wang et al. 2025)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedit_lightning.data.multimodal.mmedit import EVQA
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.image_reference import FRAMES, Image, video_of


class ADSEdit(EVQA):
    """ADS-Edit: questions about driving scenes, with their right answers.

    The records are those of ``EVQA``; ``image``, ``image_rephrase`` and ``m_loc`` may be lists of
    pictures, such as the cameras of a car, or a video, of which some frames are read, spread
    evenly over it; they are decoded by PyAV, of the extra ``vision``.
    Paper: https://arxiv.org/abs/2503.20756.

    Args:
        path: File with the records to edit and test.
        image_root: Folder that paths of ``image`` and ``m_loc`` start from; the folder of the file
            when absent.
        rephrase_root: Folder that paths of ``image_rephrase`` start from; ``image_root`` when
            absent.
        frames: Frames that are read of a video.
        **settings: Those of all datasets, such as ``limit`` and ``train_path``.
    """

    where_to_get_it = "; its files are linked at https://github.com/zjunlp/EasyEdit"

    def __init__(
        self,
        path: str | Path | None = None,
        image_root: str | Path | None = None,
        rephrase_root: str | Path | None = None,
        frames: int = FRAMES,
        **settings: Any,
    ) -> None:
        super().__init__(path, image_root, rephrase_root, **settings)
        self.frames = frames

    def seen(
        self, fields: Fields, key: str, root: str | Path | None = None, needed: bool = False
    ) -> Image | None:
        """The pictures that a field names, or frames of its videos."""
        value = fields.values.get(key)
        if isinstance(value, dict):
            raise InvalidRequestError(
                f"field '{fields.place(key)}' is an object; give a picture, a video, or a list"
            )
        names = value if isinstance(value, list) else [value]
        counted = [
            f"{name}#frames={self.frames}"
            if isinstance(name, str) and video_of(name) == (name, FRAMES)
            else name
            for name in names
        ]
        if counted != names:
            fields = Fields({**fields.values, key: counted}, fields.path)
        return super().seen(fields, key, root, needed)
