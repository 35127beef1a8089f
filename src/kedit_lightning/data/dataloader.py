"""The loader of all datasets: batches of text, resumable and sharded over ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

import torch.distributed
from lightning.pytorch.utilities import CombinedLoader

from kedit_lightning.errors import ResumeError

Row = TypeVar("Row")
Batch = TypeVar("Batch")


def process_rank() -> tuple[int, int]:
    """Rank and number of processes; ``(0, 1)`` outside a distributed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def chunks(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Cut rows into runs of ``size``; the last may be shorter.

    >>> chunks([1, 2, 3], 2)
    [[1, 2], [3]]
    """
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def evaluation_chunks(
    rows: Sequence[Row], size: int, rank: int = 0, world_size: int = 1
) -> list[Sequence[Row]]:
    """The chunks of one rank: whole chunks dealt to the ranks in turn.

    A chunk holds the same rows for any number of ranks, so rows that are edited together stay
    together.  No row comes twice, which would count it twice in the results.  A rank that is left
    without any gets a chunk without rows: Lightning leaves out the whole loop of a rank without
    batches, and the others would wait for its results for ever.
    """
    whole = chunks(rows, size)
    return whole[rank::world_size] or ([()] if whole else [])


def training_chunks(
    rows: Sequence[Row], size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> list[Sequence[Row]]:
    """The chunks of one rank in one epoch, shuffled by seed and epoch.

    Every rank gets equally many rows, since gradients are averaged at each step; fewer rows than
    ranks are left out, others in each epoch.
    """
    order = list(rows)
    # A text as seed is hashed by its content, alike in every process and Python version.
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return chunks(order[: len(order) - len(order) % world_size][rank::world_size], size)


class BatchLoader(Generic[Batch]):
    """Loader for Lightning's loops that can resume in the middle of an epoch.

    Lightning saves and restores ``state_dict`` with the checkpoint of ``fit``.

    Args:
        batches: Function from the number of an epoch to its batches, from the first one on.
        length: Number of batches in an epoch; ``None`` if it is not known.
        identity: Values that fix the order (file hash, batch size, seed, ...); a state saved under
            another identity is refused in the middle of an epoch.
        ahead: Number of batches that Lightning has fetched but not yet used.
        prepared: Function that gives batches again, ready for use; what resuming skips never
            reaches it.
    """

    batch_sampler = None
    """Lightning looks for this where there is a ``sampler``."""

    def __init__(
        self,
        batches: Callable[[int], Iterable[Batch]],
        length: int | None,
        identity: Mapping[str, int | str],
        ahead: int = 0,
        prepared: Callable[[Iterator[Batch]], Iterable[Batch]] = iter,
    ) -> None:
        self._batches, self._prepared = batches, prepared
        self._length = length
        self._identity = dict(identity)
        self._ahead = ahead
        self._epoch = self._start = self._given = 0
        self._ended = False

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("the number of batches is not known before the source is read")
        return self._length

    @property
    def sampler(self) -> BatchLoader[Batch]:
        """The loader itself: Lightning announces the epoch to a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; a new epoch starts at its first batch."""
        if epoch != self._epoch:
            self._epoch, self._start, self._given, self._ended = epoch, 0, 0, False

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that nothing happens before the first ``next``: Lightning creates the
        # iterator first and announces the epoch afterwards.
        start, self._start = self._start, 0
        self._given, self._ended = start, False
        for batch in self._prepared(islice(self._batches(self._epoch), start, None)):
            self._given += 1
            yield batch
        self._ended = True

    def state_dict(self) -> dict[str, Any]:
        """Epoch, number of batches used in it, and the identity of their order."""
        used = self._given if self._ended else max(0, self._given - self._ahead)
        ended = self._ended or (self._length is not None and used >= self._length)
        identity = dict(self._identity)
        return {"epoch": self._epoch, "batches": used, "ended": ended, "identity": identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ResumeError: The state is from the middle of an epoch with another order.
        """
        if state["ended"] or not state["batches"]:
            self.set_epoch(state["epoch"] + int(state["ended"]))
            self._start = self._given = 0
            return
        then, now = state["identity"], self._identity
        changed = [
            f"{key} {then.get(key)!r} -> {now.get(key)!r}"
            for key in sorted({*then, *now})
            if then.get(key) != now.get(key)
        ]
        if changed:
            raise ResumeError(
                f"the checkpoint stopped after batch {state['batches']} of epoch {state['epoch']}, "
                f"and the rest of that epoch cannot be found again: {', '.join(changed)}; restore "
                "these settings, or resume from a checkpoint saved at the end of an epoch"
            )
        self.set_epoch(state["epoch"])
        self._start = self._given = state["batches"]
        self._ended = False


class NoLoaders(CombinedLoader):
    """Empty collection of loaders, for ``val_dataloader`` without validation data.

    Lightning takes an empty list for one loader of length zero and warns about it.
    """

    def __init__(self) -> None:
        super().__init__([], "sequential")

    @property
    def flattened(self) -> list[Any]:
        """No loaders."""
        return []

    @flattened.setter
    def flattened(self, flattened: list[Any]) -> None:
        """Nothing to keep."""
