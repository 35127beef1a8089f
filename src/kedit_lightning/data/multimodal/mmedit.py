"""Visual question answering and captions (MMEdit, Cheng et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.picture_files import picture
from kedit_lightning.data.probe_fields import differing
from kedit_lightning.data.record_parsing import SkipRecord
from kedit_lightning.data.records import Fields
from kedit_lightning.image_reference import Image
from kedit_lightning.probe_task import ProbeTask
from kedit_lightning.requests import EditExample, EditRequest, Probe

#: How the question about an unrelated picture is put, as for all published results.
QUESTION = "Question: {} Short answer:"


#: Published scores of locality are those of this task.
_TASK = ProbeTask("picture")


class PictureData(EditDataModule):
    """Datasets of facts about pictures.

    Args:
        path: File with the records to edit and test.
        image_root: Folder that paths of pictures start from; the folder of the file when absent.
        **settings: Those of all datasets.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        image_root: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, **settings)
        self.image_root = image_root

    def seen(
        self, fields: Fields, key: str, root: str | Path | None = None, needed: bool = False
    ) -> Image | None:
        """The picture that a field names, or the several of a list.

        Raises:
            InvalidRequestError: A file is not there, or a needed field is missing.
        """
        if needed and key not in fields:
            fields.text(key)  # raises
        start = root or self.image_root
        setting = "rephrase_root" if root else "image_root"
        folder = self.folder if start is None else Path(start).expanduser()
        return picture(fields, key, folder, setting)

    @staticmethod
    def unrelated(prompt: str, answers: Sequence[str], image: Image | None = None) -> Probe:
        """A question that must keep its answer, without a picture or about one."""
        group = "text" if image is None else "image"
        return Probe("locality", prompt, tuple(answers), group, image=image, task=_TASK)


class EVQA(PictureData):
    """E-VQA: wrong answers to questions about pictures, with their corrections.

    The question ``src`` about ``image`` gets the answer ``alt`` in place of ``pred``, which BLIP-2
    gave. It is asked in other words, ``rephrase`` (rephrase, group ``text``), and about another
    picture of the same, ``image_rephrase`` (group ``image``). A question of Natural Questions,
    ``loc``, and one about an unrelated picture, ``m_loc`` with ``m_loc_q``, must keep their answers
    (locality, groups ``text`` and ``image``). Pictures are opened when they are asked about;
    files that are not there are reported together. Records without a new answer state no edit:
    they are left out, and listed in the results. Paper: https://arxiv.org/abs/2310.08475.

    Args:
        path: File with the records to edit and test, such as ``vqa_eval.json``.
        image_root: Folder that paths of ``image`` and ``m_loc`` start from, such as that of COCO;
            the folder of the file when absent.
        rephrase_root: Folder that paths of ``image_rephrase`` start from; ``image_root`` when
            absent.
        **settings: Those of all datasets, such as ``limit`` and ``train_path``.
    """

    where_to_get_it = "; MMEdit links its files at https://github.com/zjunlp/EasyEdit"

    def __init__(
        self,
        path: str | Path | None = None,
        image_root: str | Path | None = None,
        rephrase_root: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, image_root, **settings)
        self.rephrase_root = rephrase_root

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        if isinstance(alt := fields.values.get("alt"), str) and not alt.strip():
            raise SkipRecord("field 'alt' is empty, so the record states no edit")
        new, prompt = fields.text("alt"), fields.text("src")
        old = differing(fields.optional_text("pred"), new)
        seen = self.seen(fields, "image", needed=True)
        request = EditRequest(prompt, new, None, old, id, image=seen)
        probes = [
            Probe("rephrase", text, (new,), "text", old, seen) for text in fields.texts("rephrase")
        ]
        other = self.seen(fields, "image_rephrase", self.rephrase_root)
        if other is not None:
            probes.append(Probe("rephrase", prompt, (new,), "image", old, other))
        if "loc" in fields:
            probes.append(self.unrelated(fields.text("loc"), [fields.text("loc_ans")]))
        if "m_loc" in fields:
            question = QUESTION.replace("{}", fields.text("m_loc_q"))
            answers = fields.required_texts("m_loc_a")
            probes.append(self.unrelated(question, answers, self.seen(fields, "m_loc")))
        return EditExample.from_request(request, id, probes)


class EIC(EVQA):
    """E-IC: wrong captions of pictures, with their corrections, in the records of E-VQA.

    ``src`` asks for a caption of ``image``, and ``alt`` is the right one; probes are those of
    ``EVQA``. Paper: https://arxiv.org/abs/2310.08475.

    Args:
        path: File with the records to edit and test, such as ``caption_eval_edit.json``.
        image_root: Folder that paths of ``image`` and ``m_loc`` start from, such as that of COCO;
            the folder of the file when absent.
        rephrase_root: Folder that paths of ``image_rephrase`` start from; ``image_root`` when
            absent.
        **settings: Those of all datasets, such as ``limit`` and ``train_path``.
    """
