"""Question-answering edits of zsRE, in the format of MEND's authors."""

from __future__ import annotations

from kedit_lightning.character_forms import trimmed
from kedit_lightning.data.datamodule import EditDataModule, SkipRecord
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.requests import EditExample, EditRequest, Probe

_NQ = "nq question: "


class ZsRE(EditDataModule):
    """zsRE, questions about relations, in MEND's format.

    The question ``src`` gets the answer ``alt`` in place of ``answers[0]``, and is asked again as
    ``rephrase``. ``loc`` is a question of Natural Questions that must keep its answer (group
    ``nq``); it begins with "nq question: " as it does for all published results. Where a record has
    them, "New Question" becomes portability ``one_hop``, "inverse question" portability
    ``inverse_relation``, and "alter_subject_question" portability ``subject_replace``. Records
    whose ``alt`` is empty state no edit: they are left out, and listed in the results. Paper:
    https://arxiv.org/abs/1706.04115, edits as in https://arxiv.org/abs/2110.11309.

    Args:
        path: File with the records to edit and test, such as ``zsre_mend_eval.json``.
        train_path: File with the records that ``fit`` learns from, such as
            ``zsre_mend_train.json``.
    """

    where_to_get_it = (
        "; the evaluation file is published at "
        "https://memit.baulab.info/data/dsets/zsre_mend_eval.json"
    )

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        if isinstance(alt := fields.values.get("alt"), str) and not alt.strip():
            raise SkipRecord("field 'alt' is empty, so the record states no edit")
        new, answers = fields.text("alt"), fields.texts("answers")
        # Some records "change" the answer to itself; a contrast with itself would mean nothing.
        old = answers[0] if answers and trimmed(answers[0]) != trimmed(new) else None
        request = EditRequest(fields.text("src"), new, fields.optional_text("subject"), old, id)
        answer, old = (request.target_new,), request.target_old
        probes = []
        if "rephrase" in fields:
            probes.append(Probe("rephrase", fields.text("rephrase"), answer, contrast=old))
        if "loc" in fields:
            loc = fields.text("loc")
            if not loc.startswith(_NQ):
                raise InvalidRequestError(f"field 'loc' must begin with {_NQ!r}, got {loc!r}")
            probes.append(Probe("locality", loc, (fields.text("loc_ans"),), "nq"))
        probes += portability_probes(fields)
        if "inverse question" in fields:
            inverse, subject = fields.text("inverse question"), (fields.text("subject"),)
            probes.append(Probe("portability", inverse, subject, "inverse_relation"))
        if "alter_subject_question" in fields:
            question = fields.text("alter_subject_question")
            probes.append(Probe("portability", question, answer, "subject_replace"))
        return EditExample.from_request(request, id, probes)


def portability_probes(fields: Fields) -> list[Probe]:
    """The one-hop question that published portability files add to a record."""
    if "portability" not in fields:
        return []
    hop = fields.fields("portability")
    answer = (hop.text("New Answer"),)
    return [Probe("portability", hop.text("New Question"), answer, "one_hop")]
