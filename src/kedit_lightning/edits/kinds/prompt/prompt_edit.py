"""Edits that put facts into the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, TypedDict

from kedit_lightning.chat_turns import put_before, question_in
from kedit_lightning.edits.edit import Edit, EditableModel, Tensors, Values
from kedit_lightning.edits.effects import Effect, PromptFunction, RewritePrompt
from kedit_lightning.edits.kinds.prompt.tfidf import LexicalIndex
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.state_schema import check_names, check_value


@dataclass(frozen=True)
class PromptEntry:
    """A fact, as text before a prompt.

    Args:
        key: The prompt of the fact, by which it is retrieved when there are several.
        context: The text that states the fact; the question follows directly.
        demonstrations: Examples before it, the most similar one last.
    """

    key: str
    context: str
    demonstrations: tuple[str, ...] = ()


class _Entries(TypedDict):
    entries: list[PromptEntry]


class PromptEdit(Edit):
    """States a fact before each prompt: of several on the stack, the one most similar to it."""

    kind: ClassVar[str] = "prompt"
    rows_apart: ClassVar[bool] = False

    def __init__(
        self, base: EditableModel, entries: Sequence[PromptEntry], origin: EditOrigin | None = None
    ) -> None:
        super().__init__(base, origin)
        self.entries = tuple(entries)

    def effects(self) -> Sequence[Effect]:
        """The rewriting of prompts; all prompt edits retrieve from the same facts."""
        return [RewritePrompt(self.kind, retrieval, self.entries)]

    def state(self) -> tuple[Tensors, Values]:
        """The texts; there are no tensors."""
        return {}, {"entries": [asdict(entry) for entry in self.entries]}

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> PromptEdit:
        """Rebuild from the texts."""
        check_value("the edit", values, _Entries)
        check_names("the edit", tensors, ())
        entries = [{**e, "demonstrations": tuple(e["demonstrations"])} for e in values["entries"]]
        return cls(base, [PromptEntry(**entry) for entry in entries], origin)


def retrieval(contents: Sequence[Sequence[PromptEntry]]) -> PromptFunction:
    """A function that puts the fact most similar to a prompt before it; of equals the latest.

    Nothing is more similar to a prompt than itself, not even its words in another order.

    Demonstrations are dropped, the least similar first, until the text leaves room for an answer;
    the fact and the question never are.
    """
    entries = [entry for content in contents for entry in content]
    index = (
        LexicalIndex([question_in(entry.key) for entry in entries]) if len(entries) > 1 else None
    )

    def rewrite(prompt: str, fits: Callable[[str], bool]) -> str:
        if not entries:
            return prompt
        scores = index.scores(question_in(prompt)) if index is not None else [0.0]
        # Rounded, since the order of words moves the last digits of a score.
        ranked = zip(entries, scores, strict=True)
        ranks = [(entry.key == prompt, round(score, 9)) for entry, score in ranked]
        best = entries[max(range(len(entries)), key=lambda i: (ranks[i], i))]
        for skipped in range(len(best.demonstrations) + 1):
            context = "".join(best.demonstrations[skipped:]) + best.context
            text = put_before(context, prompt)
            if fits(text):
                break
        return text

    return rewrite
