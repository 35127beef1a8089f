"""Demonstrations of how a stated fact is read: their words, their forms and their order.

A demonstration shows a changed fact and a question.  ``copy`` asks for the fact itself, ``update``
for the fact in other words, ``retain`` for another fact, which stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from kedit_lightning.base_models.rows import join_text
from kedit_lightning.requests import EditExample, EditRequest

Form: TypeAlias = Literal["copy", "update", "retain"]

#: How many of 32 demonstrations have each form in the IKE paper's code.
QUOTA: dict[Form, int] = {"copy": 4, "update": 12, "retain": 16}


@dataclass(frozen=True)
class Demonstration:
    """One demonstration, and the record it was made of.

    Args:
        record: Id of the record.
        form: What its question asks for.
        text: The demonstration, with the empty line that ends it.
    """

    record: str
    form: Form
    text: str


def statement(request: EditRequest) -> str:
    r"""The words that state a fact, up to where a question follows.

    >>> statement(EditRequest("The capital of France is", "Lyon"))
    'New Fact: The capital of France is Lyon\nPrompt: '
    """
    return f"New Fact: {join_text(request.prompt, request.target_new)}\nPrompt: "


def demonstrate(request: EditRequest, question: str, answer: str) -> str:
    """A stated fact with a question that has been answered."""
    return f"{statement(request)}{join_text(question, answer)}\n\n"


def share_out(count: int) -> dict[Form, int]:
    """Share demonstrations among the forms as in the paper, by largest remainders.

    >>> share_out(32), share_out(3)
    ({'copy': 4, 'update': 12, 'retain': 16}, {'copy': 0, 'update': 1, 'retain': 2})
    """
    total = sum(QUOTA.values())
    shares = {form: count * quota // total for form, quota in QUOTA.items()}
    left = sorted(QUOTA, key=lambda form: -(count * QUOTA[form] % total))
    for form in left[: count - sum(shares.values())]:
        shares[form] += 1
    return shares


def shuffled_forms(count: int, generator: torch.Generator) -> list[Form]:
    """Forms of demonstrations in random order, the share of each as in the paper."""
    forms: list[Form] = [form for form, n in share_out(count).items() for _ in range(n)]
    return [forms[i] for i in torch.randperm(len(forms), generator=generator).tolist()]


def questions(example: EditExample, form: Form, asked: str) -> list[tuple[str, str]]:
    """Questions with answers that a record has for a form, but not the one that will be asked."""
    request = example.requests[0]
    if form == "copy":
        return [(request.prompt, request.target_new)]
    if form == "update":
        found = [(p.prompt, request.target_new) for p in example.probes if p.kind == "rephrase"]
    else:
        found = [
            (p.prompt, p.answers[0]) for p in example.probes if p.kind == "locality" if p.answers
        ]
    return [(prompt, answer) for prompt, answer in found if not same_text(prompt, asked)]


def make_demonstration(
    example: EditExample, form: Form, asked: str, generator: torch.Generator
) -> Demonstration:
    """Write one demonstration; a record that has nothing for the form makes a copy.

    Args:
        example: The record.
        form: The form wanted.
        asked: Prompt of the fact that is being written, which no demonstration may answer.
        generator: Chooses among the questions.
    """
    found = questions(example, form, asked)
    if not found:
        form, found = "copy", questions(example, "copy", asked)
    chosen = int(torch.randint(len(found), (1,), generator=generator))
    return Demonstration(example.id, form, demonstrate(example.requests[0], *found[chosen]))


def demonstrations_for(
    request: EditRequest, nearest: Sequence[EditExample], generator: torch.Generator
) -> list[Demonstration]:
    """Demonstrations for a fact, the one of the most similar record last.

    Args:
        request: The fact.
        nearest: Records to demonstrate with, the most similar first.
        generator: Deals out the forms and chooses among the questions.
    """
    forms = shuffled_forms(len(nearest), generator)
    made = [
        make_demonstration(example, form, request.prompt, generator)
        for example, form in zip(nearest, forms, strict=True)
    ]
    return made[::-1]


def same_text(one: str, other: str) -> bool:
    """Whether two texts differ at most in case and spacing.

    >>> same_text("The capital  of France is", "the capital of France is ")
    True
    """
    return one.casefold().split() == other.casefold().split()
