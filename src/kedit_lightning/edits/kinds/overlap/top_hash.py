"""TopHash: sparse masks that tell prompts apart (MEMOIR, Wang et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor


def feature_order(width: int, seed: int) -> Tensor:
    """The fixed random permutation that large features are sent through. Shape ``[width]``."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def top_hash(features: Tensor, active: int, order: Tensor) -> Tensor:
    """Masks of the largest features, each moved to its place in a permutation.

    Features that are large for many prompts do not all write to the columns that carry most.

    Args:
        features: Activations, less their mean over irrelevant prompts. Shape ``[n, width]``.
        active: Number of features in a mask.
        order: The permutation. Shape ``[width]``.

    Returns:
        Bool, shape ``[n, width]``, ``active`` of each row.
    """
    largest = features.abs().topk(active, dim=-1).indices
    masks = torch.zeros(features.shape, dtype=torch.bool, device=features.device)
    return masks.scatter(-1, order.to(features.device)[largest], True)


def overlaps(queries: Tensor, masks: Tensor) -> Tensor:
    """Share of each mask's features that a query's mask has too. Shape ``[batch, n]``.

    Args:
        queries: Masks of queries. Shape ``[batch, width]``.
        masks: Masks of facts. Shape ``[n, width]``.
    """
    # Sums of ones are exact in float32 for any width.
    common = queries.float() @ masks.float().T
    return common / masks.sum(-1).clamp(min=1)
