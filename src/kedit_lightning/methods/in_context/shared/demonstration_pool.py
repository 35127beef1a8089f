"""Where demonstrations come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from kedit_lightning.data import NanoFacts, Requests
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.methods.in_context.shared.demonstrations import same_text, statement
from kedit_lightning.methods.in_context.shared.retrieval import Index, make_index
from kedit_lightning.requests import EditExample, EditRequest

#: A dataset (its training split is used), a file of facts, or records.
PoolSource: TypeAlias = EditDataModule | Sequence[EditExample] | str | Path


@dataclass(frozen=True)
class Pool:
    """Records to demonstrate with, and the retriever that finds them.

    Args:
        name: What reports call it.
        examples: The records.
        retriever: ``lexical``, or a sentence-transformers model.
    """

    name: str
    examples: tuple[EditExample, ...]
    retriever: str

    @cached_property
    def _index(self) -> Index:
        return make_index([_text(example.requests[0]) for example in self.examples], self.retriever)

    def nearest(self, request: EditRequest, count: int) -> list[EditExample]:
        """The records most similar to a fact, best first, without those that are the fact's own."""
        if not count:
            return []
        own = [self._is_own(example, request) for example in self.examples]
        ranked = self._index.top(_text(request), count + sum(own))
        return [self.examples[i] for i in ranked if not own[i]][:count]

    @staticmethod
    def _is_own(example: EditExample, request: EditRequest) -> bool:
        # Not by the id: ids of different files have nothing to do with each other.  Other facts
        # of the subject are left out too, since a probe may ask for them.
        return any(
            same_text(other.prompt, request.prompt)
            or (
                other.subject is not None
                and request.subject is not None
                and same_text(other.subject, request.subject)
            )
            for other in example.requests
        )

    @cached_property
    def description(self) -> dict[str, Any]:
        """What an edit records about the pool."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(json.dumps(example.to_json(), sort_keys=True).encode())
        return {
            "name": self.name,
            "records": len(self.examples),
            "hash": digest.hexdigest()[:16],
            "retriever": self.retriever,
        }


def _text(request: EditRequest) -> str:
    return statement(request).removeprefix("New Fact: ").removesuffix("\nPrompt: ")


def pool_name(source: PoolSource | None) -> str | None:
    """A pool in one line, for reports."""
    if source is None or isinstance(source, str | Path):
        return None if source is None else str(source)
    if isinstance(source, EditDataModule):
        return type(source).__name__
    return f"{len(source)} records"


def load_pool(source: PoolSource, retriever: str) -> Pool:
    """Read the records of a pool.

    Raises:
        DataFileError: Its file is absent or holds bad records.
        InvalidRequestError: It is empty.
    """
    if isinstance(source, str | Path):
        examples: Sequence[EditExample] = Requests(train_path=source).examples("train")
    elif isinstance(source, EditDataModule):
        examples = source.examples("train")
    else:
        examples = source
    if not examples:
        raise InvalidRequestError(
            "the pool of demonstrations holds no records; give one that does, or leave it out"
        )
    return Pool(pool_name(source) or "", tuple(examples), retriever)


def pool_of_packaged_model() -> NanoFacts:
    """Facts of the packaged base model that are kept apart from its test facts."""
    return NanoFacts()
