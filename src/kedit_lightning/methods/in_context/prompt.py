"""PROMPT: the fact in the prompt, without demonstrations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import PromptEntry
from kedit_lightning.edits.kinds.prompt.retriever import LEXICAL
from kedit_lightning.methods.capabilities import Count
from kedit_lightning.methods.in_context.shared.demonstrations import statement
from kedit_lightning.methods.in_context.shared.stating_method import StatingMethod
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.requests import EditRequest


@dataclass(frozen=True)
class PROMPTSettings(MethodSettings):
    """Settings of :class:`PROMPT`."""

    top_k: Count | None
    retriever: str
    template: str | None


class PROMPT(StatingMethod):
    """States the new fact before each question: IKE without demonstrations.

    The text is ``New Fact:``, the fact, ``Prompt:`` and the question. Nothing is trained and no
    weight changes. It is the baseline of the IKE paper: https://arxiv.org/abs/2305.12740.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        top_k: Of several facts in force, the number that is stated before a question: those most
            similar to it, the most similar last. ``null`` states all in the order in which they
            were written. Where they exceed the window, those in front are dropped, never the most
            similar one.
        retriever: ``lexical`` compares words by tf-idf; anything else is the name or folder of a
            sentence-transformers model, which needs the extra ``retrieval``.
        template: Another text than the usual one, right before the question; ``{subject}``,
            ``{task}``, ``{prompt}`` and ``{target}`` stand for those of the fact. Nothing is stated
            if empty.
        seed: Seed of all random choices; there are none.
    """

    settings_type: ClassVar[type[MethodSettings]] = PROMPTSettings
    settings: PROMPTSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        top_k: int | None = 1,
        retriever: str = LEXICAL,
        template: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def statement_of(self, request: EditRequest) -> PromptEntry:
        """The statement of a fact, and how many others are stated with it."""
        known = self.settings
        usual = statement(request, known.template)
        return replace(usual, top_k=known.top_k, retriever=known.retriever)
