"""What the processes of a distributed run tell each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed

Item = TypeVar("Item")


def several_ranks() -> bool:
    """Whether this process is one of a distributed run."""
    return distributed.is_available() and distributed.is_initialized()


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over all ranks, where there are several."""
    if several_ranks():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def on_some_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Whether each flag is set on some rank, for as many flags as there are on this one.

    Args:
        flags: Those of this rank; other ranks may have more or fewer.
        device: Where ranks meet.
    """
    if not several_ranks():
        return list(flags)
    most = torch.tensor(len(flags), device=device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    found = torch.zeros(int(most), dtype=torch.int64, device=device)
    found[: len(flags)] = torch.tensor(flags, dtype=torch.int64)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found[: len(flags)].bool().tolist()


def is_first_rank() -> bool:
    """Whether what all ranks know alike is to be counted here."""
    return not several_ranks() or distributed.get_rank() == 0


def gather_over_ranks(items: Sequence[Item]) -> list[Item]:
    """The items of all ranks, in the order of the ranks; they must be picklable."""
    if not several_ranks():
        return list(items)
    gathered: list[list[Item]] = [[]] * distributed.get_world_size()
    distributed.all_gather_object(gathered, list(items))
    return [item for part in gathered for item in part]
