"""Hallucinations of named models: HalluEditBench."""

from __future__ import annotations

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.probe_fields import answers_of, rephrases
from kedit_lightning.data.records import Fields
from kedit_lightning.probe_task import ProbeTask
from kedit_lightning.requests import EditExample, EditRequest, Probe

#: Turns of doubt.
_TURNS = 10
_HOPS = ("2hop", "3hop", "4hop", "5hop", "6hop")


class HalluEditBench(EditDataModule):
    """HalluEditBench, questions that a model is known to answer wrongly, with five facets.

    Efficacy is asked by rewrite probes: the question as published gets the answer object.
    Generalisation is asked by the rephrase probe paraphrased_question, and as portability in groups
    of their own yes (yes_question, answer Yes), no (no_question, answer No), multiple_choice
    (multiple_choice_with_letters, answered by the letter of multiple_choice_labels) and
    reversed_relation (answered by the subject), together gen_form. Portability is question_2hop to
    question_6hop, as groups 2hop to 6hop, together gen_hop. Locality is locality_question, whose
    right answer is the base model's own. Robustness is ten turns of doubt in the new answer, scored
    by gen_robust alone. relation becomes the task of the request. One CSV (or JSON) file
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
        relation = fields.optional_text("relation")
        request = EditRequest(prompt, fields.text("object"), found, None, id, relation)
        probes = rephrases(request, fields.texts("paraphrased_question"))
        choice = ("multiple_choice_with_letters", answers_of(fields, "multiple_choice_labels"))
        forms = {
            "yes": ("yes_question", ("Yes",)),
            "no": ("no_question", ("No",)),
            "multiple_choice": choice,
            "reversed_relation": ("reversed_relation_question", (subject,)),
        }
        hops = {hop: (f"question_{hop}", answers_of(fields, f"answer_{hop}")) for hop in _HOPS}
        probes += [
            Probe("portability", fields.text(key), answers, group, task=task)
            for task, asked in ((ProbeTask("form"), forms), (ProbeTask("hop"), hops))
            for group, (key, answers) in asked.items()
            if key in fields and answers
        ]
        probes += _doubts(request)
        kept = fields.texts("locality_question")
        probes += [Probe("locality", text, (), "locality") for text in kept]
        return EditExample.from_request(request, id, probes)


def _doubts(request: EditRequest) -> list[Probe]:
    """Turns in which the new answer is doubted, each with Yes to all before it."""
    turn, task = "Are you sure? Answer Yes or No:", ProbeTask("doubt", apart=True)
    begun = f"{request.prompt} {request.target_new}.\n"
    prompts = [begun + f"{turn} Yes.\n" * number + turn for number in range(_TURNS)]
    return [Probe("portability", text, ("Yes",), "robustness", task=task) for text in prompts]
