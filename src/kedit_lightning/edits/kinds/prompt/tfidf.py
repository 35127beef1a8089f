"""Similarity of short texts by their words: tf-idf vectors and cosines, without a model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text.

    >>> words("Lyon's twin city is Łódź.")
    ['lyon', 's', 'twin', 'city', 'is', 'łódź']
    """
    return re.findall(r"\w+", text.lower())


class LexicalIndex:
    """Ranks texts by the cosine between tf-idf vectors of their words.

    Args:
        texts: The texts to rank.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        seen = Counter(word for count in counts for word in count)
        self._idf = {word: math.log(1 + len(texts) / n) for word, n in seen.items()}
        # A word no text holds says as much as one that a single text holds.
        self._unseen = math.log(1 + len(texts))
        self._count = len(texts)
        #: The texts that hold a word, with its entry of their vectors.
        self._entries: dict[str, list[tuple[int, float]]] = {}
        for number, count in enumerate(counts):
            for word, value in self._vector(count).items():
                self._entries.setdefault(word, []).append((number, value))

    def _vector(self, count: Counter[str]) -> dict[str, float]:
        vector = {w: (1 + math.log(n)) * self._idf.get(w, self._unseen) for w, n in count.items()}
        norm = math.sqrt(sum(value * value for value in vector.values())) or 1.0
        return {word: value / norm for word, value in vector.items()}

    def scores(self, query: str) -> list[float]:
        """Cosine of the query with each text, in the order of the texts.

        >>> index = LexicalIndex(["the capital of France", "the inventor of radio"])
        >>> [round(score, 2) for score in index.scores("who was the inventor")]
        [0.13, 0.45]
        """
        asked = self._vector(Counter(words(query)))
        scores = [0.0] * self._count
        for word, own in asked.items():
            for number, value in self._entries.get(word, ()):
                scores[number] += value * own
        return scores

    def top(self, query: str, k: int) -> list[int]:
        """Indices of the ``k`` most similar texts, best first; ties go to the earlier text."""
        scores = self.scores(query)
        return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]

    def top_of_each(self, queries: Sequence[str], k: int) -> list[list[int]]:
        """The same for each query."""
        return [self.top(query, k) for query in queries]
