"""Decompositions: multi-hop questions as chains of questions about single facts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kedit_lightning.errors import InvalidRequestError

#: Where a name stands in a question or step.
SLOT = "{}"


@dataclass(frozen=True)
class Decomposition:
    """A form of questions, and the questions that lead to their answer.

    Args:
        question: The form, with ``{}`` where a name stands.
        steps: Questions about single facts, each with ``{}``: in the first it is that name, in each
            later one the answer to the step before it.
    """

    question: str
    steps: tuple[str, ...]

    def check(self) -> None:
        """Refuse forms without exactly one slot.

        Raises:
            InvalidRequestError: The message names the form.
        """
        for form in (self.question, *self.steps):
            if form.count(SLOT) != 1:
                raise InvalidRequestError(
                    f"{form!r} of a decomposition needs {{}} exactly once, where the name stands"
                )
        if not self.steps:
            raise InvalidRequestError(
                f"decomposition {self.question!r} has no steps; give the questions that lead to "
                "its answer"
            )

    def name_in(self, question: str) -> str | None:
        """The name in a question of this form; ``None`` in another one.

        >>> form = Decomposition("The continent of the city where {} died is", ("{} died in",))
        >>> form.name_in("the continent of the city where  Marie Curie died is")
        'Marie Curie'
        """
        before, _, behind = (" ".join(part.split()) for part in self.question.partition(SLOT))
        pattern = rf"{re.escape(before)}\s*(\S.*?)\s*{re.escape(behind)}"
        found = re.fullmatch(pattern, " ".join(question.split()), re.IGNORECASE)
        return found.group(1) if found else None


def decompose(question: str, known: Sequence[Decomposition]) -> tuple[str, tuple[str, ...]] | None:
    """The name in a question and its steps, by the first form that it has; ``None`` if none."""
    for decomposition in known:
        name = decomposition.name_in(question)
        if name is not None:
            return name, decomposition.steps
    return None
