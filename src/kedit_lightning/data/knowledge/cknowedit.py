"""Chinese knowledge of CKnowEdit."""

from __future__ import annotations

from dataclasses import replace

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.probe_fields import (
    answers_of,
    differing,
    of_task,
    probe,
    rephrases,
)
from kedit_lightning.data.records import Fields
from kedit_lightning.probe_task import ProbeTask
from kedit_lightning.requests import EditExample, EditRequest, ProbeKind


class CKnowEdit(EditDataModule):
    """CKnowEdit, mistakes about Chinese poetry, idioms, pinyin, history, geography and logic.

    The prompt gets target_new in place of target_old, which a model had answered; both are whole
    sentences. rephrase becomes rephrase probes, locality and portability (lists of prompt and
    answer) probes of the same names. Records name no subject, as the prompts are questions; methods
    that need one refuse them. Answers are also compared character by character. 1,854 records in
    ten files, which a folder may hold together. Licence MIT. Paper:
    https://arxiv.org/abs/2409.05806.

    Args:
        path: File with the records to edit and test, or the folder that holds the files.
    """

    where_to_get_it = "; the files are published as the dataset zjunlp/CKnowEdit of the hub"

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        new = fields.text("target_new")
        old = next(iter(answers_of(fields, "target_old")), None)
        request = EditRequest(fields.text("prompt"), new, None, differing(old, new), id)
        probes = rephrases(request, fields.texts("rephrase"))
        kinds: tuple[ProbeKind, ...] = ("locality", "portability")
        for kind in kinds:
            found = [probe(kind, item, kind) for item in fields.objects(kind)]
            probes += [one for one in found if one is not None]
        example = EditExample.from_request(request, id, probes)
        judged: tuple[ProbeKind, ...] = ("rewrite", "rephrase", "portability")
        task = ProbeTask("characters")
        return replace(example, probes=tuple(of_task(task, example.probes, judged)))
