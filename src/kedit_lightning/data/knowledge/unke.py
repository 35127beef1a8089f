"""Long targets in free form: UnKE and EditEverything."""

from __future__ import annotations

from dataclasses import replace

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.probe_fields import of_task, rephrases
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.probe_task import ProbeTask
from kedit_lightning.requests import EditExample, EditRequest, Probe

#: Answers are passages, or parts of one.
PASSAGE = ProbeTask("passage")


class UnKE(EditDataModule):
    """UnKE, questions whose new answer is a passage of about a hundred words.

    question gets the passage answer; para_question becomes a rephrase probe, and the parts of the
    passage (sub_question with sub_answer, in pairs) become portability sub_question. All answers
    are also compared with free generations as passages (BLEU, ROUGE, embeddings). Records name no
    subject. 1,000 records. The licence is that of its repository. Paper:
    https://arxiv.org/abs/2405.15349.

    Args:
        path: File with the records to edit and test, such as ``final_data_v3.json``.
    """

    id_field = "id"
    where_to_get_it = "; the file is published in the repository TrustedLLM/UnKE"

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        task = fields.optional_text("category")
        request = EditRequest(fields.text("question"), fields.text("answer"), None, None, id, task)
        probes = rephrases(request, fields.texts("para_question"))
        example = EditExample.from_request(request, id, [*probes, *sub_questions(fields)])
        return replace(example, probes=tuple(of_task(PASSAGE, example.probes)))


class EditEverything(UnKE):
    """EditEverything, long targets of many kinds: mathematics, code, news, poetry, chemistry.

    question gets the text answer, and category becomes the task of the request; the other fields
    of UnKE are read where a record has them. The licence is that of its
    repository. Paper (AnyEdit):
    https://arxiv.org/abs/2502.05628.

    Args:
        path: File with the records to edit and test.
    """

    where_to_get_it = "; the file is published in the repository jianghoucheng/AnyEdit"


def sub_questions(fields: Fields) -> list[Probe]:
    """The questions about parts of a passage, each with the answer at its place in the list."""
    questions, answers = fields.texts("sub_question"), fields.texts("sub_answer")
    if len(questions) != len(answers):
        raise InvalidRequestError(
            f"fields 'sub_question' and 'sub_answer' must be lists of equal length, got "
            f"{len(questions)} and {len(answers)}"
        )
    pairs = zip(questions, answers, strict=True)
    return [Probe("portability", q, (a,), "sub_question") for q, a in pairs]
