"""Batches of training rows: documents of ``nano``, packed into rows of token ids."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import torch
from corpus import Document, DocumentWriter
from torch import Tensor
from torch.utils.data import IterableDataset

#: Label of a token that carries no loss.
IGNORE = -100


class PackedRows(IterableDataset[dict[str, Tensor]]):
    """Endless batches of packed rows; two shapes, both about four thousand tokens.

    Args:
        writer: writes the documents.
        rng: the seeded source of every choice.
        short: rows and tokens of the usual batch.
        long: rows and tokens of the batches with many demonstrations.
        long_share: share of long batches.
        changed_share: share of short rows that begin with a changed fact.
        near_from: number of the batch from which questions may be close to the changed fact that
            they follow (same relation, same old answer), rows are longer and changes are more
            frequent. Learning first to answer from the context makes this distinction learnable.
    """

    def __init__(
        self,
        writer: DocumentWriter,
        rng: random.Random,
        short: tuple[int, int] = (64, 64),
        long: tuple[int, int] = (26, 160),
        long_share: float = 0.12,
        changed_share: float = 0.15,
        near_from: int = 2000,
    ) -> None:
        self.writer, self.rng = writer, rng
        self.short, self.long = short, long
        self.long_share, self.changed_share = long_share, changed_share
        self.near_from = near_from
        self.skip = 0

    def _row(self, length: int, documents: Iterator[Document]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < length:
            more, loss = next(documents)
            ids += more
            labels += [i if use else IGNORE for i, use in zip(more, loss, strict=True)]
        return ids[:length], labels[:length]

    def _short(self) -> Iterator[Document]:
        if self.rng.random() < self.changed_share:
            yield self.writer.changed()
        while True:
            yield self.writer.ordinary()

    def _long(self) -> Iterator[Document]:
        most = 9 if self.writer.near else 6
        yield self.writer.demonstrations(self.rng.randint(3, most))
        while True:
            yield self.writer.ordinary()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from itertools.islice(self._batches(), self.skip, None)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        for index in itertools.count():
            if index == self.near_from:
                self.writer.near = True
                self.long, self.long_share, self.changed_share = (16, 250), 0.2, 0.35
            is_long = self.rng.random() < self.long_share
            count, length = self.long if is_long else self.short
            rows = [
                self._row(length, self._long() if is_long else self._short()) for _ in range(count)
            ]
            yield {
                "input_ids": torch.tensor([ids for ids, _ in rows]),
                "labels": torch.tensor([labels for _, labels in rows]),
            }
