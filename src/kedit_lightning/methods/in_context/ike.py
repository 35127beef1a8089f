"""IKE: in-context knowledge editing with demonstrations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.data import NanoFacts
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.edits import PromptEdit, PromptEntry
from kedit_lightning.edits.kinds.prompt.retriever import LEXICAL
from kedit_lightning.image_reference import references
from kedit_lightning.methods.capabilities import CountOrZero, Share
from kedit_lightning.methods.in_context.shared.demonstration_pool import (
    Pool,
    PoolSource,
    load_pool,
    pool_name,
)
from kedit_lightning.methods.in_context.shared.demonstrations import (
    Demonstration,
    answered_question,
    demonstrations_for,
    statement,
)
from kedit_lightning.methods.in_context.shared.stating_method import StatingMethod
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.methods.shared.row_lengths import refuse_long
from kedit_lightning.requests import EditExample, EditRequest

#: Demonstrations in the IKE paper, and the context length of its model (GPT-J) in tokens.
PUBLISHED_COUNT, PUBLISHED_CONTEXT = 32, 2048


@dataclass(frozen=True)
class IKESettings(MethodSettings):
    """Settings of :class:`IKE`; ``demonstrations`` is the number used once it is built."""

    demonstrations: CountOrZero | None
    retriever: str
    template: str | None
    picture_similarity: Share | None


class IKE(StatingMethod):
    """States the new fact before each question, after demonstrations of edited facts.

    Nothing is trained and no weight changes. Demonstrations come from the records of a pool that
    are most similar to the fact, the most similar last: some ask for the stated fact, some for a
    rephrase of it, some for another fact, which keeps its answer (4 : 12 : 16). Where the context
    exceeds the base model's window, the least similar demonstrations are dropped, never the fact
    or the question. Paper: https://arxiv.org/abs/2305.12740.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        demonstrations: Number of demonstrations; when absent 32 for models that take 2,048 tokens
            or more, and the same share of the context for others.
        pool: Source of demonstrations: a dataset, whose training split is used, or a file of facts
            in the form of the dataset ``Requests``. When absent the training split of the
            trainer's dataset, or for ``nano`` that of ``NanoFacts`` unless there is a template;
            without either the fact is stated without demonstrations.
        retriever: ``lexical`` compares words by tf-idf; anything else is the name or folder of a
            sentence-transformers model, such as ``sentence-transformers/all-MiniLM-L6-v2``, which
            needs the extra ``retrieval``.
        template: Another text than the usual one to state a fact, here and in demonstrations;
            ``{subject}``, ``{task}``, ``{prompt}`` and ``{target}`` stand for those of the fact.
            Where it leaves the target out, the fact itself is not demonstrated either.
        picture_similarity: Least cosine of the model's own visual features of a question's
            pictures and of those of a fact for the fact to be stated, between 0 and 1; facts are
            then found by the similarity of words and of pictures. When absent by words, after
            facts about the very same pictures.
        seed: Seed of the forms of demonstrations, which depend on the request too.
    """

    settings_type: ClassVar[type[MethodSettings]] = IKESettings
    settings: IKESettings
    unsaved: ClassVar[tuple[str, ...]] = ("base_model", "pool")

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        demonstrations: int | None = None,
        pool: EditDataModule | Sequence[EditExample] | Path | str | None = None,
        retriever: str = LEXICAL,
        template: str | None = None,
        picture_similarity: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)
        self._pool_source: PoolSource | None = pool
        self.save_hyperparameters({"pool": pool_name(pool)})  # its name, not its records
        self.pool: Pool | None = None
        self._warned = False

    def build(self) -> None:
        """Read the pool and settle the number of demonstrations."""
        count = self.settings.demonstrations
        count = default_count(self.base) if count is None else count
        self.settings = replace(self.settings, demonstrations=count)
        source = self._pool_source if self._pool_source is not None else self._default_source()
        if count and source is not None:
            self.pool = load_pool(source, self.settings.retriever)

    def _warn_without_pool(self) -> None:
        """Say once that there are no demonstrations; only edits need them, `predict` does not."""
        if self.settings.demonstrations and self.pool is None and not self._warned:
            self._warned = True
            warnings.warn(
                "IKE has no pool of demonstrations, so the fact is stated without any, which "
                "small models often do not follow; name one with model.pool (a dataset with a "
                "training split, or a file of facts), or set demonstrations to 0",
                stacklevel=3,
            )

    def _default_source(self) -> PoolSource | None:
        data = self.run.data
        if isinstance(data, EditDataModule):
            path = data.split_path("train")
            if path is not None and path.is_file():
                return data
        # Its facts are of no task, and need not fit a template.
        usual = self.settings.template is None and self.base.name == "nano"
        return NanoFacts() if usual else None

    def compute_edit(self, requests: Sequence[EditRequest]) -> PromptEdit:
        """Choose the demonstrations of each fact; they go before every question.

        Raises:
            InvalidRequestError: A fact and its own question do not fit into the window.
        """
        self._warn_without_pool()
        refuse_long(requests, self.too_long)
        return self._edit(requests, self.choose(requests))

    def edits_together(self, requests: Sequence[EditRequest]) -> list[PromptEdit]:
        """The edit of each request, whose demonstrations are looked for together."""
        self._warn_without_pool()
        refuse_long(requests, self.too_long)
        chosen = self.choose(requests)
        return [self._edit([r], [shown]) for r, shown in zip(requests, chosen, strict=True)]

    def _edit(
        self, requests: Sequence[EditRequest], chosen: Sequence[Sequence[Demonstration]]
    ) -> PromptEdit:
        """The edit of requests with the demonstrations of each."""
        entries = [
            replace(self.statement_of(request), demonstrations=self._texts(request, demonstrations))
            for request, demonstrations in zip(requests, chosen, strict=True)
        ]
        origin = self.origin(
            requests,
            pool=self.pool.description if self.pool else None,
            demonstrations=[[(d.record, d.form) for d in shown] for shown in chosen],
        )
        return PromptEdit(self.base, entries, origin)

    def choose(self, requests: Sequence[EditRequest]) -> list[list[Demonstration]]:
        """The demonstrations for each fact, whatever other facts are written with it."""
        count, template = self.settings.demonstrations, self.settings.template
        assert count is not None  # resolved by build()
        nearest = self.pool.nearest(requests, count) if self.pool else [[] for _ in requests]
        return [
            demonstrations_for(request, own, self.generator([request], "forms"), template)
            for request, own in zip(requests, nearest, strict=True)
        ]

    def statement_of(self, request: EditRequest) -> PromptEntry:
        """The statement of a fact, without demonstrations."""
        entry = statement(request, self.settings.template)
        least, images = self.settings.picture_similarity, references(request.image)
        if least is None or not images:
            return entry
        return replace(entry, features=self.base.picture_vector(images), similarity=least)

    def _texts(
        self, request: EditRequest, demonstrations: Sequence[Demonstration]
    ) -> tuple[str, ...]:
        template = self.settings.template
        if not demonstrations:
            return ()
        texts = tuple(demonstration.text for demonstration in demonstrations)
        if template is not None and "{target}" not in template:
            return texts
        # As in the paper's code the fact itself is demonstrated too, last of all.
        return (*texts, answered_question(request, request.prompt, request.target_new, template))


def default_count(base: BaseModel) -> int:
    """The paper's number of demonstrations, in proportion to a shorter context."""
    return min(PUBLISHED_COUNT, PUBLISHED_COUNT * base.max_tokens // PUBLISHED_CONTEXT)
