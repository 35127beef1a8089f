"""The pool of records that demonstrations are built from, and their retrieval by similarity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from kedit_lightning.data import Requests
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.edits.kinds.prompt.retriever import DenseIndex, text_index
from kedit_lightning.edits.kinds.prompt.tfidf import LexicalIndex
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.methods.in_context.shared.demonstrations import plain_text, stated_fact
from kedit_lightning.requests import EditExample, EditRequest

#: A dataset (its training split is used), a file of facts, or records.
PoolSource: TypeAlias = EditDataModule | Sequence[EditExample] | str | Path


@dataclass(frozen=True)
class Pool:
    """Records for demonstrations; ``retriever``: ``lexical``, or a sentence-transformers model."""

    name: str
    examples: tuple[EditExample, ...]
    retriever: str

    @cached_property
    def _index(self) -> LexicalIndex | DenseIndex:
        texts = [stated_fact(example.requests[0]) for example in self.examples]
        return text_index(texts, self.retriever)

    @cached_property
    def _facts(self) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
        """Numbers of the records with a prompt, and of those with a subject."""
        prompts: dict[str, set[int]] = {}
        subjects: dict[str, set[int]] = {}
        for number, example in enumerate(self.examples):
            for request in example.requests:
                prompts.setdefault(plain_text(request.prompt), set()).add(number)
                if request.subject is not None:
                    subjects.setdefault(plain_text(request.subject), set()).add(number)
        return prompts, subjects

    def _about(self, request: EditRequest) -> set[int]:
        """Records that share the prompt, or the subject, which a probe may ask for too."""
        # Ids of different files are unrelated, so texts are compared.
        prompts, subjects = self._facts
        found = prompts.get(plain_text(request.prompt), set())
        if request.subject is None:
            return found
        return found | subjects.get(plain_text(request.subject), set())

    def nearest(self, requests: Sequence[EditRequest], count: int) -> list[list[EditExample]]:
        """The records most similar to each fact, best first, without those about it itself."""
        if not count or not requests:
            return [[] for _ in requests]
        excluded = [self._about(request) for request in requests]
        texts = [stated_fact(request) for request in requests]
        rankings = self._index.top_of_each(texts, count + max(map(len, excluded)))
        return [
            [self.examples[i] for i in ranking if i not in own][:count]
            for ranking, own in zip(rankings, excluded, strict=True)
        ]

    @cached_property
    def description(self) -> dict[str, Any]:
        """Name, size, hash and retriever of the pool, which edits record."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(json.dumps(example.to_json(), sort_keys=True).encode())
        return {
            "name": self.name,
            "records": len(self.examples),
            "hash": digest.hexdigest()[:16],
            "retriever": self.retriever,
        }


def pool_name(source: PoolSource | None) -> str | None:
    """Short name of a pool, for reports."""
    if source is None or isinstance(source, str | Path):
        return None if source is None else str(source)
    return type(source).__name__ if isinstance(source, EditDataModule) else f"{len(source)} records"


def load_pool(source: PoolSource, retriever: str) -> Pool:
    """Read the records of a pool.

    Raises:
        DataFileError: The file is absent or holds bad records.
        InvalidRequestError: The pool is empty.
    """
    data = Requests(train_path=source) if isinstance(source, str | Path) else source
    examples = data.examples("train") if isinstance(data, EditDataModule) else data
    if not examples:
        raise InvalidRequestError(
            "the pool of demonstrations holds no records; give one that does, or leave it out"
        )
    return Pool(pool_name(source) or "", tuple(examples), retriever)
