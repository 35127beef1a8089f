"""Errors of vision-language models across their abilities (ComprehendEdit, Ma et al. 2024)."""

from __future__ import annotations

from kedit_lightning.data.multimodal.mmedit import QUESTION, PictureData
from kedit_lightning.data.record_parsing import SkipRecord
from kedit_lightning.data.records import Fields
from kedit_lightning.requests import EditExample, EditRequest, Probe


class ComprehendEdit(PictureData):
    """ComprehendEdit: questions of GQA, TallyQA, VSR, TextVQA and MathVista that models get wrong.

    The ``question`` about ``image`` gets its right ``answer``, and is asked in other words,
    ``rephrase`` (rephrase, group ``text``). ``locality_prompt``, without a picture, and
    ``multimodal_locality_prompt`` about ``multimodal_locality_image`` must keep their answers
    (locality, groups ``text`` and ``image``). Pictures are opened when they are asked about; files
    that are not there are reported together. Records without an answer state no edit: they are left
    out, and listed in the results. Its scores KGI and KPI are not computed: the file numbers their
    neighbours among questions of other files, and which of these a base model answered right
    before the edit is published for two models alone. Paper: https://arxiv.org/abs/2412.12821.

    Args:
        path: File with the records to edit and test, such as ``ComprehendEdit_test.json``.
        image_root: Folder that paths of pictures start from; that of the file when absent.
        **settings: Those of all datasets, such as ``limit`` and ``train_path``.
    """

    id_field = "pid"
    where_to_get_it = "; its files are linked at https://github.com/yaohui120/ComprehendEdit"

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        if isinstance(new := fields.values.get("answer"), str) and not new.strip():
            raise SkipRecord("field 'answer' is empty, so the record states no edit")
        prompt, new = fields.text("question"), fields.text("answer")
        seen = self.seen(fields, "image", needed=True)
        probes = [
            Probe("rephrase", text, (new,), "text", image=seen) for text in fields.texts("rephrase")
        ]
        if "locality_prompt" in fields:
            # EasyEdit's reader takes the question for the answer; a comparison needs neither.
            answers = fields.texts("locality_ground_truth")
            probes.append(self.unrelated(fields.text("locality_prompt"), answers))
        key = "multimodal_locality_image"
        if key in fields:
            question = fields.text("multimodal_locality_prompt")
            answers = fields.texts("multimodal_locality_ground_truth")
            asked = QUESTION.replace("{}", question)
            probes.append(self.unrelated(asked, answers, self.seen(fields, key)))
        request = EditRequest(prompt, new, None, None, id, image=seen)
        return EditExample.from_request(request, id, probes)
