"""Edits that put facts into the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from kedit_lightning.edits.edit import Edit, EditableModel, EditOrigin
from kedit_lightning.edits.kinds.prompt.tfidf import LexicalIndex


@dataclass(frozen=True)
class PromptEntry:
    """A fact, as text that is put before a prompt.

    Args:
        key: The prompt of the fact, by which it is found when there are several.
        context: The text that states the fact, up to where the question follows.
        demonstrations: Examples put before it, the most similar one last.
    """

    key: str
    context: str
    demonstrations: tuple[str, ...] = ()


class PromptEdit(Edit):
    """States facts before each prompt.

    One fact is stated before every prompt, as in the IKE paper.  With several facts on the stack,
    the one whose prompt is most similar to the question is stated.

    Args:
        base: The base model.
        entries: The facts.
        origin: Where the edit comes from.
    """

    kind: ClassVar[str] = "prompt"
    rows_apart: ClassVar[bool] = False

    def __init__(
        self,
        base: EditableModel,
        entries: Sequence[PromptEntry],
        origin: EditOrigin | None = None,
    ) -> None:
        super().__init__(base, origin)
        self.entries = tuple(entries)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The texts; there are no tensors."""
        return {}, {"entries": [asdict(entry) for entry in self.entries]}

    @classmethod
    def from_state(
        cls,
        base: EditableModel,
        origin: EditOrigin,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
    ) -> PromptEdit:
        """Rebuild from the texts."""
        entries = [
            PromptEntry(e["key"], e["context"], tuple(e["demonstrations"]))
            for e in values["entries"]
        ]
        return cls(base, entries, origin)


def render_prompt(edits: Sequence[PromptEdit], prompt: str, fits: Callable[[str], bool]) -> str:
    """Put the fact that suits a prompt before it.

    Args:
        edits: Prompt edits in the order of the stack.
        prompt: The question.
        fits: Whether a text leaves room for an answer; demonstrations are dropped from the far end
            until it does, the fact and the question never.
    """
    entries = [entry for edit in edits for entry in edit.entries]
    if not entries:
        return prompt
    best = len(entries) - 1
    if len(entries) > 1:
        scores = LexicalIndex([entry.key for entry in entries]).scores(prompt)
        # Later facts win ties, since they overwrite earlier ones.
        best = max(range(len(entries)), key=lambda i: (scores[i], i))
    chosen = entries[best]
    for skipped in range(len(chosen.demonstrations) + 1):
        text = "".join(chosen.demonstrations[skipped:]) + chosen.context + prompt
        if fits(text):
            break
    return text
