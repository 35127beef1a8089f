"""TruthfulQA: questions that people answer falsely."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.probe_task import ProbeTask
from kedit_lightning.requests import EditExample, EditRequest, Probe


class TruthfulQA(EditDataModule):
    """TruthfulQA, questions to which a false answer is common, as multiple choice and short answer.

    Read are the table (Question, Best Answer, and Correct Answers and Incorrect Answers with a
    semicolon between them), and the tasks of multiple choice (question, mc1_targets and
    mc2_targets, each choices with labels, or texts with theirs), in which the one right choice of
    mc1_targets is the best answer. The request is the question with its best answer, which is
    asked for as a short answer too; a rewrite probe of the group choice compares the probabilities
    of all right and wrong answers (mc1, mc2, mc3). Category becomes the task of the request.
    817 questions. Licence Apache 2.0. Paper: https://arxiv.org/abs/2109.07958.

    Args:
        path: File with the questions, such as ``TruthfulQA.csv`` or ``mc_task.json``.
        template: The prompt of a question, in which ``{question}`` stands for it. Published figures
            also put six questions with their answers before it.
    """

    where_to_get_it = "; the files are published in the repository sylinrl/TruthfulQA"

    def __init__(
        self,
        path: str | Path | None = None,
        limit: int | None = None,
        on_bad_record: Literal["error", "skip"] = "error",
        train_path: str | Path | None = None,
        val_path: str | Path | None = None,
        seed: int | None = None,
        locality_path: str | Path | None = None,
        locality_probes: int = 1,
        template: str = "Q: {question}\nA:",
    ) -> None:
        super().__init__(
            *(path, limit, on_bad_record, train_path, val_path, seed),
            *(locality_path, locality_probes),
        )
        if "{question}" not in template:
            raise InvalidRequestError(
                f"the template of a question needs {{question}} in it, got {template!r} "
                "(--data.template)"
            )
        self.template = template

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        if "Question" in fields:
            question, best = fields.text("Question"), fields.text("Best Answer")
            right, wrong = (_listed(fields, f"{name} Answers") for name in ("Correct", "Incorrect"))
        else:
            question = fields.text("question")
            (best, *others), _ = _labelled(fields, "mc1_targets")
            right, wrong = _labelled(fields, "mc2_targets")
            if others:
                raise InvalidRequestError(
                    f"field '{fields.place('mc1_targets')}' must have one right choice, got "
                    f"{len(others) + 1}"
                )
        right = list(dict.fromkeys([best, *right]))
        prompt = self.template.replace("{question}", question)
        category = fields.optional_text("Category")
        request = EditRequest(prompt, best, None, None, id, category)
        choice = ProbeTask("choice", against=tuple(wrong), apart=True)
        probes = [Probe("rewrite", prompt, tuple(right), "choice", task=choice)]
        return EditExample.from_request(request, id, probes)


def _listed(fields: Fields, key: str) -> list[str]:
    """Texts with semicolons between them."""
    return [text for part in fields.text(key).split(";") if (text := part.strip())]


def _labelled(fields: Fields, key: str) -> tuple[list[str], list[str]]:
    """Right and wrong choices."""
    given = fields.fields(key)
    if "choices" in given:
        texts, labels = given.required_texts("choices"), given.values.get("labels")
    else:
        texts, labels = list(given.values), list(given.values.values())
    if not isinstance(labels, list) or len(labels) != len(texts) or {*labels} - {0, 1}:
        raise InvalidRequestError(
            f"field '{fields.place(key)}' must have a label of 0 or 1 for each choice"
        )
    pairs = list(zip(texts, labels, strict=True))
    right, wrong = ([text for text, label in pairs if label == kind] for kind in (1, 0))
    if not right or not wrong:
        raise InvalidRequestError(
            f"field '{fields.place(key)}' must have a right choice and a wrong one"
        )
    return right, wrong
