"""Question-answering edits of zsRE, in the formats of MEND and of KnowEdit."""

from __future__ import annotations

from typing import NamedTuple

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.probe_fields import (
    answers_of,
    differing,
    grouped_probes,
    one_hop,
    rephrases,
)
from kedit_lightning.data.record_parsing import SkipRecord
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.requests import EditExample, EditRequest, Probe

_NQ = "nq question: "


class _Names(NamedTuple):
    """Fields of a format."""

    prompt: str
    new: str
    old: str
    rephrase: str


_MEND = _Names("src", "alt", "answers", "rephrase")
_KNOWEDIT = _Names("prompt", "target_new", "ground_truth", "rephrase_prompt")


class ZsRE(EditDataModule):
    """zsRE, questions about relations, in MEND's format or KnowEdit's.

    The question ``src`` gets the answer ``alt`` in place of ``answers[0]``, and is asked again as
    ``rephrase``. ``loc`` is a question of Natural Questions that must keep its answer (group
    ``nq``); it begins with "nq question: " as it does for all published results. Where a record has
    them, "New Question" becomes portability ``one_hop``, "inverse question" portability
    ``inverse_relation``, and "alter_subject_question" portability ``subject_replace``. In
    KnowEdit's format the fields are ``prompt``, ``target_new``, ``ground_truth`` and
    ``rephrase_prompt``, and probes have the groups that the file names. Records whose new answer is
    empty state no edit: they are left out, and listed in the results. A subject that its question
    lacks is dropped, and counted in a warning. Sizes: 163,196 (MEND, train) and 19,086 (test);
    10,000 and 1,304 (KnowEdit). Papers: https://arxiv.org/abs/1706.04115, edits as in
    https://arxiv.org/abs/2110.11309.

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
        form = _MEND if "src" in fields else _KNOWEDIT
        if isinstance(alt := fields.values.get(form.new), str) and not alt.strip():
            raise SkipRecord(f"field '{form.new}' is empty, so the record states no edit")
        new, answers = fields.text(form.new), answers_of(fields, form.old)
        # Some records "change" the answer to itself; a contrast with itself would mean nothing.
        old = differing(next(iter(answers), None), new)
        prompt = fields.text(form.prompt)
        subject = self.subject_of(prompt, fields.optional_text("subject"), id)
        request = EditRequest(prompt, new, subject, old, id)
        probes = rephrases(request, fields.texts(form.rephrase))
        if form is _KNOWEDIT:
            probes += grouped_probes(fields, "locality") + grouped_probes(fields, "portability")
            return EditExample.from_request(request, id, probes)
        if "loc" in fields:
            loc = fields.text("loc")
            if not loc.startswith(_NQ):
                raise InvalidRequestError(f"field 'loc' must begin with {_NQ!r}, got {loc!r}")
            probes.append(Probe("locality", loc, (fields.text("loc_ans"),), "nq"))
        probes += one_hop(fields)
        if "inverse question" in fields:
            inverse, whose = fields.text("inverse question"), (fields.text("subject"),)
            probes.append(Probe("portability", inverse, whose, "inverse_relation"))
        if "alter_subject_question" in fields:
            question, answer = fields.text("alter_subject_question"), (request.target_new,)
            probes.append(Probe("portability", question, answer, "subject_replace"))
        return EditExample.from_request(request, id, probes)
