"""Changes of Wikidata over months: WikiBigEdit."""

from __future__ import annotations

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.probe_fields import answers_of, personas_and_hops, rephrases
from kedit_lightning.data.records import Fields
from kedit_lightning.requests import EditExample, EditRequest, Probe


class WikiBigEdit(EditDataModule):
    """WikiBigEdit, real changes of Wikidata in eight steps of time, for lifelong editing.

    The question update gets the answer ans; rephrase becomes a rephrase probe. personas, the
    question as somebody would put it, becomes portability personas; mhop with mhop_ans portability
    multi_hop; loc with loc_ans locality wikidata. tag (new or update) becomes the task of the
    request. Over 500,000 records in eight files. Licence Apache-2.0. Paper:
    https://arxiv.org/abs/2503.05683.

    Args:
        path: File with the records to edit and test, such as
            ``wiki_big_edit_20240201_20240220.json``.
    """

    where_to_get_it = "; the files are published as the dataset lukasthede/WikiBigEdit of the hub"

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        prompt, new = fields.text("update"), fields.text("ans")
        subject = self.subject_of(prompt, fields.optional_text("subject"), id)
        request = EditRequest(prompt, new, subject, None, id, fields.optional_text("tag"))
        probes = rephrases(request, fields.texts("rephrase"))
        probes += personas_and_hops(fields, request.target_new)
        if "loc" in fields:
            kept = answers_of(fields, "loc_ans")
            probes.append(Probe("locality", fields.text("loc"), kept, "wikidata"))
        return EditExample.from_request(request, id, probes)
