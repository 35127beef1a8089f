"""A pool of packed training rows on the device, kept fresh by processes that write documents."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parents[1] / "nano"))

from corpus import DocumentWriter
from fact_book import FactBook
from packed_rows import IGNORE, PackedRows

#: Batches of ``PackedRows``, about four thousand tokens each, that are written in one go.
BATCHES = 32
#: Shares of long rows and of rows that begin with a changed fact, less than in ``nano``: there are
#: four times as many facts to see. ``near`` rows have the shares of ``nano``.
LONG_SHARE, CHANGED_SHARE, NEAR_LONG_SHARE = 0.06, 0.1, 0.2
#: Rows as 16-bit numbers, and whether each token carries loss, by their length.
Chunk = dict[int, tuple[np.ndarray[Any, Any], ...]]

_WRITERS: list[DocumentWriter] = []


def open_writer(prepared: Path) -> None:
    """Read facts and text in this process, once."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(prepared)
    sentences = (prepared / "text.txt").read_text(encoding="utf-8").splitlines()
    book = FactBook.read(prepared)
    _WRITERS[:] = [DocumentWriter(book, sentences, tokenizer.backend_tokenizer, random.Random(0))]


def _open_worker(prepared: Path) -> None:
    torch.set_num_threads(1)
    open_writer(prepared)


def write_chunk(seed: str, near: bool) -> Chunk:
    """Rows that follow from the seed.

    Args:
        seed: names the chunk.
        near: whether questions may be close to the changed fact they follow.
    """
    writer, rng = _WRITERS[0], random.Random(seed)
    writer.rng, writer.near = rng, near
    rows = PackedRows(
        writer,
        rng,
        long_share=LONG_SHARE,
        changed_share=CHANGED_SHARE,
        near_from=0 if near else sys.maxsize,
    )
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for batch in itertools.islice(rows, BATCHES):
        ids, labels = batch["input_ids"], batch["labels"]
        found.setdefault(ids.shape[1], []).append((ids, labels != IGNORE))
    return {length: _joined(parts) for length, parts in found.items()}


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[np.ndarray[Any, Any], ...]:
    ids, loss = (torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True))
    return ids.astype(np.int16), loss


class RowPool:
    """Rows on the device, drawn at random; the oldest make room for new ones.

    Args:
        prepared: folder that ``prepare.py`` has written.
        device: where rows are kept.
        seed: of the rows and the draws.
        workers: processes that write rows; with none, rows are written as they are needed.
        capacity: tokens that are kept for each length of rows.
        least: tokens to begin with.
    """

    def __init__(
        self,
        prepared: Path,
        device: str,
        seed: int = 0,
        workers: int = 0,
        capacity: int = 64_000_000,
        least: int = 250_000,
    ) -> None:
        self.device, self.seed, self.least, self.capacity = device, seed, least, capacity
        self.written = self.taken = 0
        self._numbers, self._draws = itertools.count(), random.Random(f"{seed} draws")
        self._near = False
        self._rows: dict[int, list[Tensor]] = {}
        self._filled: Counter[int] = Counter()
        self._next: dict[int, int] = {}
        self._processes: Any = None
        self._pending: list[tuple[bool, Any]] = []
        if workers:
            # Forked before the device is used, which a forked process could not.
            self._processes = multiprocessing.get_context("fork").Pool(
                workers, _open_worker, (prepared,)
            )
            self._ahead = 2 * workers
        else:
            open_writer(prepared)

    def begin_at(self, number: int) -> None:
        """Write other rows than a run that has ended has read: chunks are numbered from here on."""
        self._numbers = itertools.count(number)

    def close(self) -> None:
        """End the processes."""
        if self._processes is not None:
            self._processes.terminate()
            self._processes.join()

    def fill(self, near: bool = False) -> None:
        """Wait until there are enough rows to begin with; ``near`` starts the pool anew."""
        if near != self._near:
            self._near = near
            self._rows, self._filled, self._next = {}, Counter(), {}
            begin = self.written
        else:
            begin = 0
        while self.written - begin < self.least or len(self._filled) < 2:
            self._receive(wait=True)

    def take(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of rows of one length, as many as make so many tokens."""
        self._receive(wait=self._processes is None and self.taken >= self.written)
        lengths, longer = sorted(self._filled), NEAR_LONG_SHARE if self._near else LONG_SHARE
        # Shares as the rows were written, also when the pool of one length is full.
        weights = [1 - longer if length == lengths[0] else longer for length in lengths]
        length = self._draws.choices(lengths, weights)[0]
        count = max(1, tokens // length)
        at = torch.randint(self._filled[length], (count,), device=self.device)
        ids, loss = (kept[at] for kept in self._rows[length])
        ids = ids.long()
        self.taken += ids.numel()
        return ids, ids.masked_fill(~loss, IGNORE)

    def _receive(self, wait: bool) -> None:
        if self._processes is None:
            if wait:
                self._add(write_chunk(self._name(), self._near))
            return
        while len(self._pending) < self._ahead:
            task = self._processes.apply_async(write_chunk, (self._name(), self._near))
            self._pending.append((self._near, task))
        if wait:
            self._pending[0][1].wait()
        left = []
        for near, task in self._pending:
            if not task.ready():
                left.append((near, task))
            elif near == self._near:  # else of the part of the training that is over
                self._add(task.get())
        self._pending = left

    def _name(self) -> str:
        return f"{self.seed} {next(self._numbers)}"

    def _add(self, chunk: Chunk) -> None:
        for length, (ids, loss) in chunk.items():
            room = self.capacity // length
            if length not in self._rows:
                self._rows[length] = [
                    torch.zeros(room, length, dtype=torch.int16, device=self.device),
                    torch.zeros(room, length, dtype=torch.bool, device=self.device),
                ]
            begin = self._next.get(length, 0)
            at = (torch.arange(begin, begin + len(ids)) % room).to(self.device)
            self._rows[length][0][at] = torch.from_numpy(ids).to(self.device)
            self._rows[length][1][at] = torch.from_numpy(loss).to(self.device)
            self._next[length] = (begin + len(ids)) % room
            self._filled[length] = min(room, self._filled[length] + len(ids))
            self.written += ids.size
