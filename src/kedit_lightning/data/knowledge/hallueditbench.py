"""Hallucinations of named models: HalluEditBench."""

from __future__ import annotations

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.probe_fields import answers_of, rephrases
from kedit_lightning.data.records import Fields
from kedit_lightning.requests import EditExample, EditRequest, Probe

_HOPS = ("2hop", "3hop", "4hop", "5hop", "6hop")


class HalluEditBench(EditDataModule):
    """HalluEditBench, questions that a model is known to answer wrongly, with five facets.

    The question as published gets the answer object. paraphrased_question becomes a rephrase probe.
    Generalisation as the paper asks it becomes portability yes (yes_question, answer Yes), no
    (no_question, answer No), multiple_choice (multiple_choice_with_letters, answered by the letter
    of multiple_choice_labels) and reversed_relation (answered by the subject); question_2hop to
    question_6hop become portability 2hop to 6hop; locality_question becomes locality, whose right
    answer is the base model's own. relation becomes the task of the request. One CSV (or JSON) file
    for each model and domain, 9 domains and 26 topics. The licence is that of
    its repository. Paper:
    https://arxiv.org/abs/2410.16251.

    Args:
        path: File with the records to edit and test.
    """

    where_to_get_it = "; the files are published in the repository llm-editing/HalluEditBench"

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        prompt, subject = fields.text("question"), fields.text("subject")
        found = self.subject_of(prompt, subject, id)
        task = fields.optional_text("relation")
        request = EditRequest(prompt, fields.text("object"), found, None, id, task)
        probes = rephrases(request, fields.texts("paraphrased_question"))
        choice = ("multiple_choice_with_letters", answers_of(fields, "multiple_choice_labels"))
        asked = {
            "yes": ("yes_question", ("Yes",)),
            "no": ("no_question", ("No",)),
            "multiple_choice": choice,
            "reversed_relation": ("reversed_relation_question", (subject,)),
            **{hop: (f"question_{hop}", answers_of(fields, f"answer_{hop}")) for hop in _HOPS},
        }
        probes += [
            Probe("portability", fields.text(key), answers, group)
            for group, (key, answers) in asked.items()
            if key in fields and answers
        ]
        kept = fields.texts("locality_question")
        probes += [Probe("locality", text, (), "locality") for text in kept]
        return EditExample.from_request(request, id, probes)
