"""Shards of a side memory: their random masks, and how several become one (Wang et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from peft.utils.merge_utils import (
    calculate_majority_sign_mask,
    dare_linear,
    dare_ties,
    disjoint_merge,
    task_arithmetic,
    ties,
)
from torch import Tensor

Merge: TypeAlias = Literal["ties", "dare_ties", "dare_linear", "linear", "sign", "slerp"]


def shard_mask(shape: tuple[int, int], share: float, seed: int, shard: int) -> Tensor:
    """Which entries of a change the facts of a shard may use; the same in every process.

    Args:
        shape: ``(d_out, d_in)``.
        share: Share of the entries.
        seed: Seed of all masks.
        shard: Number of the shard; masks of different shards are independent.
    """
    number = torch.Generator().manual_seed((seed * 1_000_003 + shard) % 2**63)
    return torch.rand(shape, generator=number) < share


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two tensors of one shape, from ``one`` (0) to ``other`` (1).

    The angle is that between the directions; tensors along one line are interpolated linearly.
    """
    norms = one.norm() * other.norm()
    cosine = float((one * other).sum() / norms) if norms > 0 else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return torch.lerp(one, other, share)
    first = math.sin((1 - share) * angle) / math.sin(angle)
    return first * one + math.sin(share * angle) / math.sin(angle) * other


def merge_shards(shards: Sequence[Tensor], how: Merge, density: float, seed: int) -> Tensor:
    """One change from those of several shards; of one shard it is that of the shard.

    ``ties`` keeps the largest entries of each, and where several remain averages those that have
    the sign of their sum: disjoint shards are summed.  ``sign`` does so without the pruning.  The
    two forms of DARE keep random entries instead, scaled up.  ``linear`` is the mean, and ``slerp``
    interpolates one shard after another on the sphere.

    Args:
        shards: Changes ``[d_out, d_in]``, in order.
        how: The rule.
        density: Share of the entries that ``ties`` and DARE keep.
        seed: Seed of the entries that DARE keeps.
    """
    if len(shards) == 1:
        return shards[0]
    if how == "slerp":
        merged = shards[0]
        for number, shard in enumerate(shards[1:], start=2):
            merged = slerp(merged, shard, 1 / number)
        return merged
    ones, several = torch.ones(len(shards), dtype=shards[0].dtype), list(shards)
    if how == "linear":
        return task_arithmetic(several, ones / len(shards))
    if how == "sign" or density == 1:
        stacked = torch.stack(several)
        return disjoint_merge(stacked, calculate_majority_sign_mask(stacked))
    if how == "ties":
        return ties(several, ones, density)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.manual_seed(seed)
        return (dare_ties if how == "dare_ties" else dare_linear)(several, ones, density)
