"""Facts about drawn shapes, which the packaged base model ``shapes`` knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedit_lightning.data.datamodule import Split
from kedit_lightning.data.multimodal.drawing import Drawing
from kedit_lightning.data.multimodal.mmedit import EVQA
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.image_reference import Image, settled
from kedit_lightning.requests import EditExample, Probe

_PACKAGED = Path(__file__).parents[1] / "shapes_facts"


class Shapes(EVQA):
    """True facts about drawn pictures that the packaged base model ``shapes`` knows.

    Each picture shows shapes of one colour, form, number and place, and each record has a false
    answer to write about one. Records are those of ``EVQA``, with a description in place of a
    picture's file, from which it is drawn when the record is read; ``image_rephrase`` is another
    drawing of the same. Beside its probes a record asks about a picture that differs in one point
    (locality group ``near``), and another question about the picture itself (group ``same``). No
    content of the test split is in a drawing that the model or ``fit`` has learned from. All files
    are packaged; nothing needs to be named.

    Args:
        path: File to edit and test instead of the packaged one.
        image_root: Folder that paths of pictures start from, where a file names any.
        rephrase_root: Folder that paths of ``image_rephrase`` start from; ``image_root`` when
            absent.
        **settings: Those of all datasets, such as ``limit`` and ``train_path``.
    """

    where_to_get_it = ", or leave it out to use the packaged file"

    def __init__(
        self,
        path: str | Path | None = None,
        image_root: str | Path | None = None,
        rephrase_root: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, image_root, rephrase_root, **settings)

    def split_path(self, split: Split) -> Path:
        """The file named for a split, or else the packaged one."""
        return super().split_path(split) or _PACKAGED / f"{split}.jsonl"

    def seen(
        self, fields: Fields, key: str, root: str | Path | None = None, needed: bool = False
    ) -> Image | None:
        """The picture that a field describes, drawn, or the one that it names."""
        description = fields.values.get(key)
        if not isinstance(description, dict):
            return super().seen(fields, key, root, needed)
        try:
            return settled(Drawing.of(description).image())
        except InvalidRequestError as error:
            raise InvalidRequestError(f"field '{fields.place(key)}' {error}") from error

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        example = super().parse(fields, id)
        probes = list(example.probes)
        for item in fields.objects("near"):
            answers = tuple(item.required_texts("answer"))
            image = self.seen(item, "image", needed=True)
            probes.append(Probe("locality", item.text("prompt"), answers, "near", image=image))
        (request,) = example.requests
        for item in fields.objects("same"):
            answers = tuple(item.required_texts("answer"))
            probes.append(
                Probe("locality", item.text("prompt"), answers, "same", image=request.image)
            )
        return EditExample(example.requests, tuple(probes), id)
