"""Facts of driving scenes in one picture, or in several (ADS-Edit, Wang et al. 2025)."""

from __future__ import annotations

from kedit_lightning.data.multimodal.mmedit import EVQA
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.requests import EditExample

_FILMS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


class ADSEdit(EVQA):
    """ADS-Edit: questions about driving scenes, with their right answers.

    The records are those of ``EVQA``; ``image``, ``image_rephrase`` and ``m_loc`` may be lists of
    pictures, such as the cameras of a car or the frames of a video. A video is read as the list of
    its frames: film files are refused, so take their frames out first.
    Paper: https://arxiv.org/abs/2503.20756.

    Args:
        path: File with the records to edit and test.
        image_root: Folder that paths of ``image`` and ``m_loc`` start from; the folder of the file
            when absent.
        rephrase_root: Folder that paths of ``image_rephrase`` start from; ``image_root`` when
            absent.
        **settings: Those of all datasets, such as ``limit`` and ``train_path``.
    """

    where_to_get_it = "; its files are linked at https://github.com/zjunlp/EasyEdit"

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        for key in ("image", "image_rephrase", "m_loc"):
            value = fields.values.get(key)
            names = value if isinstance(value, list) else [value]
            if isinstance(value, dict) or any(str(name).lower().endswith(_FILMS) for name in names):
                raise InvalidRequestError(
                    f"field '{key}' names a film; give its frames, a list of pictures"
                )
        return super().parse(fields, id)
