"""IKE: the new fact is stated before each question, after demonstrations of how to read it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.spec import PACKAGED
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.edits import PromptEdit, PromptEntry
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.in_context.shared.demonstration_pool import (
    Pool,
    PoolSource,
    load_pool,
    pool_name,
    pool_of_packaged_model,
)
from kedit_lightning.methods.in_context.shared.demonstrations import (
    Demonstration,
    demonstrate,
    demonstrations_for,
    statement,
)
from kedit_lightning.methods.in_context.shared.retrieval import LEXICAL
from kedit_lightning.methods.method import Capabilities, EditMethod
from kedit_lightning.requests import EditExample, EditRequest

#: Demonstrations in the IKE paper, and the context of the model (GPT-J) they were chosen for.
PUBLISHED_COUNT, PUBLISHED_CONTEXT = 32, 2048


class IKE(EditMethod):
    """States the new fact before each question, after demonstrations that show how to read it.

    Nothing is trained and no weight is touched. Demonstrations are made of the records of a pool
    that are most similar to the fact, the most similar last: some ask for the stated fact, some
    for the fact in other words, some for another fact, which stays as it was (4 : 12 : 16). Where
    a context grows too long for the base model, demonstrations are left out from the far end,
    never the fact or the question. Paper: https://arxiv.org/abs/2305.12740.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        demonstrations: How many; when absent 32 for models that take 2,048 tokens or more, and the
            same share of the context for others.
        pool: Where they come from: a dataset, whose training split is used, or a file of facts as
            the dataset ``Requests`` reads it. When absent the training split of the dataset that
            the trainer runs on, or for ``nano`` that of ``NanoFacts``; without either the fact is
            stated without demonstrations.
        retriever: ``lexical`` compares words; anything else is the name or folder of a
            sentence-transformers model, such as ``sentence-transformers/all-MiniLM-L6-v2``, which
            needs the extra ``retrieval``.
        seed: Start of all random choices; together with the requests it fixes them.
    """

    can: ClassVar[Capabilities] = Capabilities(encoder_decoder=True)
    unsaved: ClassVar[tuple[str, ...]] = ("base_model", "pool")

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        demonstrations: int | None = None,
        pool: EditDataModule | Sequence[EditExample] | Path | str | None = None,
        retriever: str = LEXICAL,
        seed: int = 0,
    ) -> None:
        super().__init__(base_model, seed)
        self.demonstrations = demonstrations
        self.retriever = retriever
        self.source: PoolSource | None = pool
        self.hparams["pool"] = pool_name(pool)
        self.pool: Pool | None = None

    def build(self) -> None:
        """Read the pool and settle the number of demonstrations."""
        self.count = usual_count(self.base) if self.demonstrations is None else self.demonstrations
        if self.count < 0:
            raise UnsupportedUseError(
                f"demonstrations must be 0 or more, got {self.count}; 0 states the fact alone"
            )
        source = self.source if self.source is not None else self._derived_source()
        if self.count and source is not None:
            self.pool = load_pool(source, self.retriever)
        elif self.count:
            warnings.warn(
                "IKE has no pool of demonstrations, so the fact is stated without any, which "
                "small models often do not follow; name one with model.pool (a dataset with a "
                "training split, or a file of facts), or set demonstrations to 0",
                stacklevel=2,
            )

    def _derived_source(self) -> PoolSource | None:
        data = self.run.data
        if isinstance(data, EditDataModule):
            path = data.split_path("train")
            if path is not None and path.is_file():
                return data
        return pool_of_packaged_model() if self.base.name in PACKAGED else None

    def compute_edit(self, requests: Sequence[EditRequest]) -> PromptEdit:
        """Write the texts that go before each question."""
        chosen = [self.choose(request) for request in requests]
        entries = [
            PromptEntry(request.prompt, statement(request), self._texts(request, found))
            for request, found in zip(requests, chosen, strict=True)
        ]
        notes: dict[str, Any] = {
            "pool": self.pool.description if self.pool else None,
            "demonstrations": [[(d.record, d.form) for d in found] for found in chosen],
        }
        return PromptEdit(self.base, entries, self.origin(requests, **notes))

    def choose(self, request: EditRequest) -> list[Demonstration]:
        """The demonstrations for one fact, whatever other facts are written with it."""
        nearest = self.pool.nearest(request, self.count) if self.pool else []
        return demonstrations_for(request, nearest, self.generator([request], "forms"))

    @staticmethod
    def _texts(request: EditRequest, found: Sequence[Demonstration]) -> tuple[str, ...]:
        if not found:
            return ()
        # As in the paper's code the fact itself is demonstrated too, last of all.
        return (*(d.text for d in found), demonstrate(request, request.prompt, request.target_new))


def usual_count(base: BaseModel) -> int:
    """Demonstrations that take as much of the context as the paper's do, at most as many."""
    return min(PUBLISHED_COUNT, PUBLISHED_COUNT * base.max_tokens // PUBLISHED_CONTEXT)
