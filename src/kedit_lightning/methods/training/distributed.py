"""Reductions and gathers over the ranks of a distributed run; the identity on one process."""

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


def any_over_ranks(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Logical or over all ranks of this rank's flags; other ranks may have more or fewer."""
    if not several_ranks():
        return list(flags)
    count = torch.tensor(len(flags), device=device)
    distributed.all_reduce(count, distributed.ReduceOp.MAX)
    reduced = torch.zeros(int(count), dtype=torch.int64, device=device)
    reduced[: len(flags)] = torch.tensor(flags, dtype=torch.int64)
    distributed.all_reduce(reduced, distributed.ReduceOp.MAX)
    return reduced[: len(flags)].bool().tolist()


def is_first_rank() -> bool:
    """Whether this is rank 0, which adds terms that are equal on all ranks to a sum over them."""
    return not several_ranks() or distributed.get_rank() == 0


def gather_over_ranks(items: Sequence[Item]) -> list[Item]:
    """The items of all ranks, in the order of ranks; they must be picklable."""
    if not several_ranks():
        return list(items)
    gathered: list[list[Item]] = [[]] * distributed.get_world_size()
    distributed.all_gather_object(gathered, list(items))
    return [item for part in gathered for item in part]
