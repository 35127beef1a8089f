"""ICE: the fact in the prompt, behind an instruction to answer with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import PromptEntry
from kedit_lightning.edits.kinds.prompt.retriever import LEXICAL
from kedit_lightning.methods.capabilities import Count
from kedit_lightning.methods.in_context.shared.demonstrations import stated_fact
from kedit_lightning.methods.in_context.shared.stating_method import StatingMethod
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.requests import EditRequest

#: What the model is asked to do with the facts.
INSTRUCTION = "Take the following new facts as true, and use them to answer the question.\n"


@dataclass(frozen=True)
class ICESettings(MethodSettings):
    """Settings of :class:`ICE`."""

    instruction: str
    top_k: Count | None
    retriever: str


class ICE(StatingMethod):
    """States the new fact before each question, behind an instruction to answer with it.

    The text is the instruction, ``New Fact:``, the fact with a full stop, ``Prompt:`` and the
    question, as the in-context row of KnowEdit has it: https://arxiv.org/abs/2401.01286. Its words
    are ours, since the released code has no such method to run. Nothing is trained and no weight
    changes.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        instruction: The text before the facts; it should end with a line break. A model that was
            never given instructions may answer better without one.
        top_k: Of several facts in force, the number that is stated before a question: those most
            similar to it, the most similar last. ``null`` states all in the order in which they
            were written. Where they exceed the window, those in front are dropped, never the most
            similar one.
        retriever: ``lexical`` compares words by tf-idf; anything else is the name or folder of a
            sentence-transformers model, which needs the extra ``retrieval``.
        seed: Seed of all random choices; there are none.
    """

    settings_type: ClassVar[type[MethodSettings]] = ICESettings
    settings: ICESettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        instruction: str = INSTRUCTION,
        top_k: int | None = 1,
        retriever: str = LEXICAL,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def statement_of(self, request: EditRequest) -> PromptEntry:
        """The instruction and the fact, which a full stop ends."""
        known, fact = self.settings, stated_fact(request).removesuffix(".")
        return replace(
            super().statement_of(request),
            instruction=known.instruction,
            fact=f"New Fact: {fact}.\n",
            top_k=known.top_k,
            retriever=known.retriever,
        )
