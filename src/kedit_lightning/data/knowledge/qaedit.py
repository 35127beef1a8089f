"""Questions of real question-answering sets: QAEdit."""

from __future__ import annotations

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.probe_fields import answers_of, rephrases
from kedit_lightning.data.records import Fields
from kedit_lightning.requests import EditExample, EditRequest, Probe


class QAEdit(EditDataModule):
    """QAEdit, questions of NQ, TriviaQA and SimpleQA that a model answers wrongly.

    The question prompt gets the answer target; rephrase becomes a rephrase probe and the items of
    locality (loc, loc_ans) probes of group qa. source becomes the task of the request. Ids repeat
    across sources, so records are named by their position. A subject
    that its question lacks is dropped, and counted in a warning. 1,000 records are published
    with their locality. Licence Apache-2.0. Paper: https://arxiv.org/abs/2502.11177.

    Args:
        path: File with the records to edit and test, such as ``QAEdit_inter_1k.json``.
    """

    where_to_get_it = (
        "; the file is published in the repository WanliYoung/Revisit-Editing-Evaluation"
    )

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        prompt = fields.text("prompt")
        subject = self.subject_of(prompt, fields.optional_text("subject"), id)
        task = fields.optional_text("source")
        request = EditRequest(prompt, fields.text("target"), subject, None, id, task)
        probes = rephrases(request, fields.texts("rephrase"))
        probes += [
            Probe("locality", item.text("loc"), answers_of(item, "loc_ans"), "qa")
            for item in fields.objects("locality")
        ]
        return EditExample.from_request(request, id, probes)
