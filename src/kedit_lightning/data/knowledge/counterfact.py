"""CounterFact, in the flat format of EasyEdit and the nested format of ROME."""

from __future__ import annotations

from kedit_lightning.character_forms import trimmed
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.probe_fields import (
    differing,
    filled,
    neighbours,
    one_hop,
    rephrases,
)
from kedit_lightning.data.records import Fields
from kedit_lightning.requests import EditExample, EditRequest, Probe


class CounterFact(EditDataModule):
    """CounterFact, sentences completed with a false object, flat or nested.

    Nested records (ROME's ``counterfact.json``) and flat ones (EasyEdit's
    ``counterfact-edit.json``) are told apart by content, one by one. Paraphrases become rephrase
    probes. Neighbourhood prompts ask for other subjects with the same true object: locality group
    ``neighborhood``, whose right answer is the true object and whose contrast is the new one. Where
    a record has them, "New Question" becomes portability ``one_hop``, ``alternative_subject``
    portability ``subject_replace``, ``distracting_neighborhood_prompts`` locality
    ``distracting_neighborhood`` and ``unrelated_relation`` locality ``unrelated_relation``.
    ``relation_id`` becomes the task of the request. Attribute prompts (other subjects that have the
    new object anyway) and generation prompts are not read. Paper: https://arxiv.org/abs/2202.05262.

    Args:
        path: File with the records to edit and test, such as ``counterfact.json``.
        train_path: File with the records that ``fit`` learns from, such as
            ``counterfact-train.json``.
    """

    id_field = "case_id"
    where_to_get_it = (
        "; ROME's file is published at https://rome.baulab.info/data/dsets/counterfact.json"
    )

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record, flat or nested; see the class for its fields."""
        return self._nested(fields, id) if "requested_rewrite" in fields else self._flat(fields, id)

    def _flat(self, fields: Fields, id: str) -> EditExample:
        new, old = fields.text("target_new"), fields.optional_text("ground_truth")
        request = EditRequest(
            fields.text("prompt"), new, fields.optional_text("subject"), differing(old, new), id
        )
        new = request.target_new
        probes = rephrases(request, fields.texts("rephrase_prompt"))
        if "locality_prompt" in fields:
            answer = fields.text("locality_ground_truth")
            probes += neighbours([fields.text("locality_prompt")], answer, new)
        return EditExample.from_request(request, id, [*probes, *one_hop(fields)])

    def _nested(self, fields: Fields, id: str) -> EditExample:
        rewrite = fields.fields("requested_rewrite")
        template, subject = rewrite.text("prompt"), rewrite.text("subject")
        prompt = filled(template, subject, rewrite.place("prompt"))
        new = rewrite.fields("target_new").text("str")
        old = rewrite.fields("target_true").text("str")
        task = rewrite.optional_text("relation_id")
        request = EditRequest(prompt, new, subject, differing(old, new), id, task)
        new, old = request.target_new, trimmed(old)
        probes = rephrases(request, fields.texts("paraphrase_prompts"))
        probes += neighbours(fields.texts("neighborhood_prompts"), old, new)
        distracting = fields.texts("distracting_neighborhood_prompts")
        probes += neighbours(distracting, old, new, "distracting_neighborhood")
        if "unrelated_relation" in fields:
            other = fields.fields("unrelated_relation")
            answer = (other.text("object"),)
            probes.append(Probe("locality", other.text("question"), answer, "unrelated_relation"))
        probes += one_hop(fields)
        if "alternative_subject" in fields:
            alias = template.replace("{}", fields.text("alternative_subject"))
            probes.append(Probe("portability", alias, (new,), "subject_replace"))
        return EditExample.from_request(request, id, probes)
