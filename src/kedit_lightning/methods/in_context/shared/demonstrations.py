"""Demonstrations of in-context editing: text, form and order (Zheng et al. 2023, section 3).

A demonstration states a new fact and answers a question.  The form ``copy`` asks for the fact
itself, ``update`` for a rephrase of it, ``retain`` for another fact, which keeps its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from kedit_lightning.base_models.rows import join_text
from kedit_lightning.chat_turns import question_in
from kedit_lightning.edits import PromptEntry
from kedit_lightning.image_reference import content_hash, references
from kedit_lightning.methods.shared.fact_template import filled_template
from kedit_lightning.requests import EditExample, EditRequest

Form: TypeAlias = Literal["copy", "update", "retain"]

#: Demonstrations of each form among 32, as in the IKE paper's code.
QUOTA: dict[Form, int] = {"copy": 4, "update": 12, "retain": 16}


@dataclass(frozen=True)
class Demonstration:
    """Id of the record a demonstration comes from, its form, and its text with an empty line."""

    record: str
    form: Form
    text: str


def stated_fact(request: EditRequest) -> str:
    """A fact as a sentence.

    >>> stated_fact(EditRequest("The capital of France is", "Lyon"))
    'The capital of France is Lyon'
    """
    return join_text(question_in(request.prompt), request.target_new)


def statement(request: EditRequest, template: str | None = None) -> PromptEntry:
    r"""The statement of a fact, up to where a question follows; from a template where one is given.

    >>> statement(EditRequest("The capital of France is", "Lyon")).statement
    'New Fact: The capital of France is Lyon\nPrompt: '
    """
    context, fact = "Prompt: ", f"New Fact: {stated_fact(request)}\n"
    if template is not None:
        context, fact = "", filled_template(template, request)
    images = tuple(map(content_hash, references(request.image)))
    return PromptEntry(request.prompt, context, fact=fact, images=images)


def answered_question(
    request: EditRequest, question: str, answer: str, template: str | None = None
) -> str:
    """The statement of a fact, a question and its answer."""
    return f"{statement(request, template).statement}{join_text(question_in(question), answer)}\n\n"


def form_counts(count: int) -> dict[Form, int]:
    """Number of demonstrations of each form, in the paper's proportions by largest remainders.

    >>> form_counts(32), form_counts(3)
    ({'copy': 4, 'update': 12, 'retain': 16}, {'copy': 0, 'update': 1, 'retain': 2})
    """
    total = sum(QUOTA.values())
    shares = {form: count * quota // total for form, quota in QUOTA.items()}
    left = sorted(QUOTA, key=lambda form: -(count * QUOTA[form] % total))
    for form in left[: count - sum(shares.values())]:
        shares[form] += 1
    return shares


def shuffled_forms(count: int, generator: torch.Generator) -> list[Form]:
    """Forms of demonstrations in random order, in the paper's proportions."""
    forms: list[Form] = [form for form, n in form_counts(count).items() for _ in range(n)]
    return [forms[i] for i in torch.randperm(len(forms), generator=generator).tolist()]


def candidate_questions(example: EditExample, form: Form, prompt: str) -> list[tuple[str, str]]:
    """Questions with answers that a record offers for a form, without the prompt of the edit."""
    request = example.requests[0]
    if form == "copy":
        return [(request.prompt, request.target_new)]
    probes = example.probes
    if form == "update":
        pairs = [(p.prompt, request.target_new) for p in probes if p.kind == "rephrase"]
    else:
        pairs = [(p.prompt, p.answers[0]) for p in probes if p.kind == "locality" and p.answers]
    return [(question, answer) for question, answer in pairs if not same_text(question, prompt)]


def build_demonstration(
    example: EditExample,
    form: Form,
    prompt: str,
    generator: torch.Generator,
    template: str | None = None,
) -> Demonstration:
    """A demonstration that does not answer the edit's prompt; a copy if there is no question."""
    questions = candidate_questions(example, form, prompt)
    if not questions:
        form, questions = "copy", candidate_questions(example, "copy", prompt)
    question = questions[int(torch.randint(len(questions), (1,), generator=generator))]
    text = answered_question(example.requests[0], *question, template)
    return Demonstration(example.id, form, text)


def demonstrations_for(
    request: EditRequest,
    nearest: Sequence[EditExample],
    generator: torch.Generator,
    template: str | None = None,
) -> list[Demonstration]:
    """Demonstrations from the nearest records, most similar first, in reverse order."""
    forms = shuffled_forms(len(nearest), generator)
    demonstrations = [
        build_demonstration(example, form, request.prompt, generator, template)
        for example, form in zip(nearest, forms, strict=True)
    ]
    return demonstrations[::-1]


def same_text(one: str, other: str) -> bool:
    """Whether two texts are equal up to case and spacing.

    >>> same_text("The capital  of France is", "the capital of France is ")
    True
    """
    return plain_text(one) == plain_text(other)


def plain_text(text: str) -> str:
    """A text without what :func:`same_text` does not tell apart."""
    return " ".join(text.casefold().split())
