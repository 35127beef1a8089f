"""Multi-hop questions of MQuAKE."""

from __future__ import annotations

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.probe_fields import answers_of, differing, filled, rephrases
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.requests import EditExample, EditRequest, Probe


class MQuAKE(EditDataModule):
    """MQuAKE, questions over several facts of which one or more are edited.

    All edits of a record (requested_rewrite) are written together, each with a rewrite probe, and
    its question as rephrase. The wordings of the multi-hop question become portability multi_hop;
    its right answers are new_answer and all of new_answer_alias. The facts of the chain after the
    edit (new_single_hops) become portability single_hop, with their aliases. A case counts as
    answered when any of its wordings is. The files CF (9,218 and 3,000 records), T (1,868), hard
    (429) and the remastered ones have the same fields; where the remastered ones split answers by
    the kind of edit, new_answer is read. Licence MIT. Paper: https://arxiv.org/abs/2305.14795.

    Args:
        path: File with the records to edit and test, such as ``MQuAKE-CF-3k.json``.
    """

    id_field = "case_id"
    where_to_get_it = "; the files are published in the repository princeton-nlp/MQuAKE"

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        requests: list[EditRequest] = []
        probes: list[Probe] = []
        items = fields.objects("requested_rewrite")
        if not items:
            raise InvalidRequestError("field 'requested_rewrite' must hold at least one edit")
        for index, item in enumerate(items):
            subject, new = item.text("subject"), item.fields("target_new").text("str")
            old = item.fields("target_true").text("str") if "target_true" in item else None
            prompt = filled(item.text("prompt"), subject, item.place("prompt"))
            name = id if len(items) == 1 else f"{id}-{index}"
            task = item.optional_text("relation_id")
            request = EditRequest(prompt, new, subject, differing(old, new), name, task)
            requests.append(request)
            probes += EditExample.from_request(request, id).probes
            probes += rephrases(request, item.texts("question"))
        final = (*answers_of(fields, "new_answer"), *answers_of(fields, "new_answer_alias"))
        if not final:
            raise InvalidRequestError("field 'new_answer' is missing")
        questions = fields.texts("questions")
        probes += [Probe("portability", text, final, "multi_hop") for text in questions]
        for hop in fields.objects("new_single_hops"):
            right = (*answers_of(hop, "answer"), *answers_of(hop, "answer_alias"))
            probes.append(Probe("portability", hop.text("question"), right, "single_hop"))
        return EditExample(tuple(requests), tuple(probes), id)
