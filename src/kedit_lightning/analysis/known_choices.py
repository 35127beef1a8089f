"""Questions with four choices, made from the facts that ``nano`` knows.

They ask for the true objects of subjects that no edit of the benchmark is about: those of the train
split of ``NanoFacts``. The wrong choices are other objects of the same relation.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from dataclasses import dataclass
from importlib.resources import files

from kedit_lightning.analysis.harness import RequestAnswers
from kedit_lightning.base_models import BaseModel

#: The name that asks for them among tasks of general ability.
CHOICES_TASK = "nano_choices"
#: Questions, and choices of each.
QUESTIONS, CHOICES = 120, 4


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with its choices.

    Args:
        id: Its name.
        prompt: The question, which a choice completes.
        choices: What may stand behind it.
        right: Which of them is true.
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    right: int


def choice_questions(limit: int | None = None) -> list[ChoiceQuestion]:
    """The questions, in a fixed order of their own; the first ones where there is a limit."""
    text = files("kedit_lightning.data").joinpath("nano_facts", "train.jsonl").read_text("utf-8")
    facts = [json.loads(line) for line in text.splitlines()]
    objects: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        asked = fact["requested_rewrite"]
        objects[asked["relation_id"]].add(asked["target_true"]["str"])
    found = []
    for fact in sorted(facts, key=lambda fact: _draw(fact["case_id"])):
        asked, id = fact["requested_rewrite"], str(fact["case_id"])
        right = asked["target_true"]["str"]
        others = sorted(objects[asked["relation_id"]] - {right})
        if len(others) < CHOICES - 1:
            continue
        draw = random.Random(f"choices of {id}")
        choices = [right, *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        prompt = asked["prompt"].format(asked["subject"])
        found.append(ChoiceQuestion(id, prompt, tuple(choices), choices.index(right)))
    return found[: QUESTIONS if limit is None else min(limit, QUESTIONS)]


def choice_scores(
    base: BaseModel, batch_size: int = 16, limit: int | None = None
) -> dict[str, float]:
    """1 for each question whose right choice is the likeliest, 0 for the others.

    A choice is as likely as its whole text behind the question, under the edits that are applied.
    """
    questions = choice_questions(limit)
    pairs = [(q.prompt, f" {choice}") for q in questions for choice in q.choices]
    values = [value for value, _ in RequestAnswers(base, batch_size).log_likelihoods(pairs)]
    rows = [values[at : at + CHOICES] for at in range(0, len(values), CHOICES)]
    return {
        q.id: float(row.index(max(row)) == q.right) for q, row in zip(questions, rows, strict=True)
    }


def _draw(id: int) -> bytes:
    return hashlib.sha256(f"choices/{id}".encode()).digest()
