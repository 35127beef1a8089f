"""MeLLo: multi-hop questions answered from a store of edited facts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits.kinds.prompt.decomposition import Decomposition
from kedit_lightning.edits.kinds.prompt.decomposition_edit import DecompositionEdit, MultiHopPlan
from kedit_lightning.edits.kinds.prompt.fact_store import StoredFact
from kedit_lightning.edits.kinds.prompt.retriever import LEXICAL
from kedit_lightning.errors import DataFileNotFoundError, InvalidRequestError
from kedit_lightning.methods.capabilities import Count
from kedit_lightning.methods.in_context.shared.demonstrations import stated_fact
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.requests import EditRequest


@dataclass(frozen=True)
class MeLLoSettings(MethodSettings):
    """Settings of :class:`MeLLo`."""

    decompositions: str | None
    hops: Count
    max_new_tokens: Count
    retriever: str


class MeLLo(EditMethod):
    """Keeps the new facts in a store, and answers questions step by step with what it holds.

    The model writes a scratchpad behind examples: a sub-question, its own answer, the stored fact
    most similar to the sub-question, whether the two contradict, and so on up to the final answer.
    Nothing is trained and no weight changes. Paper: https://arxiv.org/abs/2305.14795. Its examples
    are ours, in the paper's form; of several paraphrases of a question none is chosen for you.

    A model that cannot take questions apart can be given forms of questions with their steps. A
    step that is the prompt of a stored fact has that fact's answer; any other the model answers,
    with a stored fact about the same subject stated before it. Questions of no given form are asked
    as they are.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        decompositions: A JSON file with a list of objects ``question`` and ``steps``, such as
            ``{"question": "The continent of the city where {} died is", "steps": ["{} died in",
            "The continent of {} is"]}``; when absent the model writes sub-questions of its own.
        hops: Most sub-questions of a scratchpad.
        max_new_tokens: Longest text that the model writes in one piece.
        retriever: ``lexical`` compares words by tf-idf; anything else is the name or folder of a
            sentence-transformers model, which needs the extra ``retrieval``; the paper's is
            ``facebook/contriever-msmarco``.
        seed: Seed of all random choices; there are none.
    """

    can: ClassVar[Capabilities] = Capabilities(encoder_decoder=True)
    settings_type: ClassVar[type[MethodSettings]] = MeLLoSettings
    settings: MeLLoSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        decompositions: str | None = None,
        hops: int = 4,
        max_new_tokens: int = 64,
        retriever: str = LEXICAL,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)
        self.decompositions: tuple[Decomposition, ...] = ()

    def build(self) -> None:
        """Read the decompositions."""
        if self.settings.decompositions is not None:
            self.decompositions = read_decompositions(Path(self.settings.decompositions))

    def compute_edit(self, requests: Sequence[EditRequest]) -> DecompositionEdit:
        """Store the facts."""
        known = self.settings
        plan = MultiHopPlan(
            self.decompositions,
            hops=known.hops,
            max_new_tokens=known.max_new_tokens,
            retriever=known.retriever,
        )
        facts = [
            StoredFact(r.prompt, r.target_new, stated_fact(r), r.subject or "") for r in requests
        ]
        return DecompositionEdit(self.base, facts, plan, self.origin(requests))


def read_decompositions(path: Path) -> tuple[Decomposition, ...]:
    """Read a file of decompositions.

    Raises:
        DataFileNotFoundError: There is no such file.
        InvalidRequestError: It holds something else; the message names the first such entry.
    """
    if not path.is_file():
        raise DataFileNotFoundError(
            f"file of decompositions '{path}' does not exist; give a JSON list of objects "
            "'question' and 'steps', or leave it out"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequestError(f"file '{path}' is no JSON: {error}") from error
    if not isinstance(values, list) or not values:
        raise InvalidRequestError(f"file '{path}' must hold a list of decompositions")
    return tuple(_decomposition(value, f"entry {i} of '{path}'") for i, value in enumerate(values))


def _decomposition(value: Any, where: str) -> Decomposition:
    fields = dict(value) if isinstance(value, Mapping) else {}
    question, steps = fields.pop("question", None), fields.pop("steps", None)
    wanted = isinstance(question, str) and isinstance(steps, list)
    if fields or not wanted or not all(isinstance(step, str) for step in steps or ()):
        raise InvalidRequestError(
            f"{where} must be an object with a text 'question' and a list of texts 'steps'"
        )
    found = Decomposition(str(question), tuple(map(str, steps or ())))
    try:
        found.check()
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{where}: {error}") from error
    return found
