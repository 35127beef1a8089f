"""The store of edited facts that sub-questions are looked up in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kedit_lightning.edits.kinds.prompt.retriever import text_index


@dataclass(frozen=True)
class StoredFact:
    """An edited fact.

    Args:
        prompt: The prompt of its request.
        answer: What is true now.
        sentence: Both as a sentence, by which it is retrieved.
        subject: What it is about; empty where the request does not say.
    """

    prompt: str
    answer: str
    sentence: str
    subject: str = ""

    def answers(self, question: str) -> bool:
        """Whether a question is the fact's own prompt, up to case and spacing."""
        return question.casefold().split() == self.prompt.casefold().split()

    def concerns(self, question: str) -> bool:
        """Whether a question is about the fact's subject, or its whole prompt without one."""
        words, about = (
            f" {' '.join(text.casefold().split())} " for text in (question, self.subject)
        )
        return about in words if self.subject else self.answers(question)


class FactStore:
    """Facts by the similarity of their sentences; of equal prompts the latest holds.

    Args:
        facts: The facts, oldest first.
        retriever: ``lexical``, or a sentence-transformers model.
    """

    def __init__(self, facts: Iterable[StoredFact], retriever: str) -> None:
        latest = {" ".join(fact.prompt.casefold().split()): fact for fact in facts}
        self.facts = tuple(latest.values())
        self._by_prompt = latest
        self._index = text_index([fact.sentence for fact in self.facts], retriever)

    def nearest(self, question: str) -> StoredFact:
        """The fact that a question asks for, or else the one most similar to it."""
        exact = self._by_prompt.get(" ".join(question.casefold().split()))
        return exact or self.facts[self._index.top(question, 1)[0]]
