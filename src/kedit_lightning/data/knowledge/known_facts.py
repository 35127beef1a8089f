"""Facts that GPT-2 knows, for causal tracing."""

from __future__ import annotations

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.records import Fields
from kedit_lightning.requests import EditExample, EditRequest


class KnownFacts(EditDataModule):
    """known-1000, true facts that GPT-2 XL completes rightly, for causal tracing.

    The request states the fact itself: prompt, subject, and the attribute as its answer, so that
    tracing has an answer to follow, and an edit with it should change little. relation_id becomes
    the task of the request. 1,209 records. Licence MIT. Paper: https://arxiv.org/abs/2202.05262.

    Args:
        path: File with the records, such as ``known_1000.json``.
    """

    id_field = "known_id"
    where_to_get_it = (
        "; the file is published at https://rome.baulab.info/data/dsets/known_1000.json"
    )

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        prompt, answer = fields.text("prompt"), fields.text("attribute")
        subject = self.subject_of(prompt, fields.text("subject"), id)
        task = fields.optional_text("relation_id")
        return EditExample.from_request(EditRequest(prompt, answer, subject, None, id, task), id)
