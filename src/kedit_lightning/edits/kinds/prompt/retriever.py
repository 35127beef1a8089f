"""Retrievers: indices of short texts that rank them by similarity to a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kedit_lightning.edits.kinds.prompt.tfidf import LexicalIndex
from kedit_lightning.errors import BaseModelNotFoundError, MissingExtraError

#: The built-in retriever: tf-idf of words, without a model.
LEXICAL = "lexical"


def sentence_encoder(name: str, use: str, way_out: str) -> Any:
    """A sentence-transformers model.

    Args:
        name: Its name on the hub, or a folder.
        use: What it is for, such as ``retriever 'name'``.
        way_out: What to do without one.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        BaseModelNotFoundError: There is no such encoder.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError(
            f"{use} needs sentence-transformers: pip install 'kedit-lightning[retrieval]', or "
            f"{way_out}"
        ) from error
    try:
        return SentenceTransformer(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BaseModelNotFoundError(
            f"sentence encoder '{name}' could not be loaded ({reason}); give a folder, a name on "
            f"the hub that this machine can reach or has in its cache, or {way_out}"
        ) from error


class DenseIndex:
    """Ranks texts by the cosine of embeddings of a sentence-transformers model, name or folder.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        BaseModelNotFoundError: There is no such encoder.
    """

    def __init__(self, texts: Sequence[str], encoder: str) -> None:
        use = f"retriever '{encoder}'"
        self._encoder = sentence_encoder(encoder, use, "use retriever: lexical")
        self._vectors = self._embed(texts)

    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        vectors = self._encoder.encode(
            list(texts),
            normalize_embeddings=True,
            convert_to_tensor=True,
            show_progress_bar=len(texts) > 2000,
        )
        return torch.as_tensor(vectors).float().cpu().clone()

    def scores(self, query: str) -> list[float]:
        """Cosine of the query with each text, in the order of the texts."""
        return (self._vectors @ self._embed([query])[0]).tolist()

    def top(self, query: str, k: int) -> list[int]:
        """Indices of the ``k`` most similar texts, best first; ties go to the earlier text."""
        return self.top_of_each([query], k)[0]

    def top_of_each(self, queries: Sequence[str], k: int) -> list[list[int]]:
        """The same for each query; they are embedded together."""
        scores = self._embed(queries) @ self._vectors.T
        return scores.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()


def text_index(texts: Sequence[str], retriever: str) -> LexicalIndex | DenseIndex:
    """An index of texts; ``retriever``: ``lexical``, or a sentence-transformers model."""
    return LexicalIndex(texts) if retriever == LEXICAL else DenseIndex(texts, retriever)
