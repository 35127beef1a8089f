"""Sums over the processes of a distributed run."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, distributed


def several_ranks() -> bool:
    """Whether this process is one of a distributed run."""
    return distributed.is_available() and distributed.is_initialized()


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over all ranks, where there are several."""
    if several_ranks():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def is_first_rank() -> bool:
    """Whether what all ranks know alike is to be counted here."""
    return not several_ranks() or distributed.get_rank() == 0
