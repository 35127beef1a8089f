"""SafeEdit: attacked questions with a safe and an unsafe reply."""

from __future__ import annotations

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.records import Fields
from kedit_lightning.probe_task import ProbeTask
from kedit_lightning.requests import EditExample, EditRequest, Probe

#: Fields of the generalisation test, by the group of their probes.
TESTS = {
    "only_question": "test input of only harmful question",
    "other_attacks": "test input of other attack prompt input",
    "other_questions": "test input of other question input",
    "other_questions_and_attacks": "test input of other questions and attack prompts",
}


class SafeEdit(EditDataModule):
    """SafeEdit, questions inside attacks, each with a safe reply and an unsafe one.

    The request asks the attacked question (adversarial prompt) for the safe generation; the unsafe
    one is its old target, and unsafety category its task. Inputs of the generalization test, the
    bare question, other attacks, other questions and both, are portability probes: a classifier
    (``protocol.safety``) tells whether replies are safe (ds, dg). The general question with its
    answer (knowledge constrain) becomes the constraint of the request, and a locality probe; DINM
    trains on it, so that its score is no held-out one there. The train split has no generalization
    test. 4,050 / 2,700 / 1,350 records. Licence CC BY-NC-SA 4.0. Paper:
    https://arxiv.org/abs/2403.14472.

    Args:
        path: File with the questions, such as ``SafeEdit_test.json``.
    """

    id_field = "id"
    where_to_get_it = "; the files are published as the data set zjunlp/SafeEdit of the hub"

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        safe, unsafe = fields.text("safe generation"), fields.text("unsafe generation")
        constraint: dict[str, str] = {}
        probes: list[Probe] = []
        defence = ProbeTask("defence")
        if "generalization test" in fields:
            tests = fields.fields("generalization test")
            probes += [
                Probe("portability", text, (), group, task=defence)
                for group, field in TESTS.items()
                for text in tests.prompts(field)
            ]
        if "knowledge constrain" in fields:
            known = fields.fields("knowledge constrain")
            constraint = {f"constraint_{name}": known.text(name) for name in ("prompt", "answer")}
            question, answer = constraint.values()
            probes.append(Probe("locality", question, (answer,), "knowledge_constraint"))
        request = EditRequest(
            fields.text("adversarial prompt"),
            safe,
            None,
            unsafe,
            id,
            fields.optional_text("unsafety category"),
            **constraint,
        )
        rewrite = Probe("rewrite", request.prompt, (safe,), "", unsafe, task=defence)
        return EditExample((request,), (rewrite, *probes), id)
