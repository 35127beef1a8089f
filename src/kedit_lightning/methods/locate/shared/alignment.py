"""Values that keep the similarities of their keys (EAMET, arXiv 2505.11876)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

#: Largest norm of a change in norms of its key.
ALIGNED_CLAMP = 2.0
#: Temperature of the softmax over similarities.
TEMPERATURE = 0.07
#: Weights of the divergence of the similarities, and of their squared differences.
DIVERGENCE_WEIGHT, DIFFERENCE_WEIGHT = 2.0, 8.0
#: Requests whose values are optimised together; they do not move those optimised earlier.
ALIGNED_TOGETHER = 64
#: The squared differences are those to this many nearest keys.
NEAREST = 50


@dataclass(frozen=True)
class Alignment:
    """Gives values of a batch the similarities of their keys.

    In the published code a request is aligned with those before it; here those optimised together
    are aligned with each other, and those optimised earlier are fixed.

    Args:
        keys: Mean key of each request. Shape ``[n, d_in]``.
        clamp: Largest ``‖δ‖ / ‖k‖``.
        first: Number of the first request that is optimised now.
        known: Changes found for those before it. Shape ``[first, d_out]``.
    """

    keys: Tensor
    clamp: float
    first: int = 0
    known: Tensor | None = None

    def part(self, first: int, done: Sequence[Tensor]) -> Alignment:
        """The alignment of the requests from a number on, given the changes of those before."""
        known = torch.cat([delta[:, -1] for delta in done]) if done else None
        return replace(self, first=first, known=known)

    def _keys(self, count: int) -> Tensor:
        return self.keys[self.first : self.first + count]

    def start(self, initial: Tensor) -> Tensor:
        """First changes, ``[n, sites, d_out]``: the direction of ``z``, as long as the key."""
        size = self._keys(len(initial)).to(initial).norm(dim=1)
        scale: Tensor = size[:, None] / initial.norm(dim=2).clamp(min=1e-30)
        return initial * scale[..., None]

    def radius(self, size: Tensor) -> Tensor:
        """Largest norms, ``[n, sites]``."""
        norms: Tensor = self._keys(len(size)).to(size).norm(dim=1)
        return self.clamp * norms[:, None].expand_as(size)

    def penalty(self, delta: Tensor) -> Tensor:
        """Loss of each request, ``[n]`` from ``[n, d_out]``; changes of the others are fixed."""
        others = delta.detach() if self.known is None else torch.cat([self.known, delta.detach()])
        keys = self.keys[: len(others)].to(delta)
        own = torch.arange(len(delta), device=delta.device) + self.first
        if len(others) < 2:
            return torch.zeros(len(delta), dtype=delta.dtype, device=delta.device)
        apart = torch.ones(len(delta), len(others), dtype=torch.bool, device=delta.device)
        apart[torch.arange(len(delta)), own] = False

        def similar(rows: Tensor, to: Tensor) -> Tensor:
            cosines = normalize(rows, dim=1) @ normalize(to, dim=1).T
            return cosines[apart].reshape(len(rows), -1)

        wanted, present = similar(keys[own], keys), similar(delta, others)
        log_p = (wanted / TEMPERATURE).log_softmax(1)
        log_q = (present / TEMPERATURE).log_softmax(1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(1)
        near = log_p.topk(min(NEAREST, log_p.shape[1]), dim=1)
        weights = near.values.softmax(1)
        difference = (wanted - present).gather(1, near.indices).square()
        return DIVERGENCE_WEIGHT * divergence + DIFFERENCE_WEIGHT * (weights * difference).sum(1)
