"""Training of T-Patcher's patches: a key, a bias and a value for each mistake."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.rounding import indistinct
from kedit_lightning.methods.capabilities import CountOrZero, NotNegative, Positive, PositiveShare
from kedit_lightning.methods.memory.shared.last_block import LastBlockPasses
from kedit_lightning.methods.memory.tpatcher.patch_losses import activation_loss, memory_loss
from kedit_lightning.methods.method import MethodSettings


@dataclass(frozen=True)
class TPatcherSettings(MethodSettings):
    """Settings of :class:`TPatcher`."""

    lr: Positive
    steps: CountOrZero
    activation_weight: NotNegative
    memory_weight: NotNegative
    margin: NotNegative
    top_share: PositiveShare
    amplify: Positive
    weight_decay: NotNegative
    stop_loss: NotNegative
    irrelevant: CountOrZero
    background: str | None


@dataclass(frozen=True)
class PatchMemory:
    """Queries on which patches shall be silent.

    Args:
        shared: Those of all patches. Shape ``[m, d]``.
        others: Those that some patches have. Shape ``[k, d]``.
        counts: Which of ``others`` each patch has. Bool, shape ``[n, k]``.
    """

    shared: Tensor
    others: Tensor
    counts: Tensor

    @classmethod
    def of(
        cls, shared: Tensor, others: Tensor, queries: Tensor, mine: Tensor, rounding: float
    ) -> PatchMemory:
        """The memory of patches for ``queries``, ``[n, d]``.

        A patch has those of ``others`` that are marked in ``mine``, ``[n, k]``, except for one that
        equals its own query.
        """
        exact = "donot_use_mm_for_euclid_dist"
        same = indistinct(torch.cdist(queries, others, compute_mode=exact), others, rounding)
        return cls(shared, others, mine & ~same)

    def select(self, index: Tensor) -> PatchMemory:
        """The memory of some of the patches, by number."""
        return PatchMemory(self.shared, self.others, self.counts[index])

    def scores(self, keys: Tensor, biases: Tensor) -> Tensor:
        """``m·k + b``; ``-inf`` where a query is none of the patch. ``[n, m + k]``."""
        others = (keys @ self.others.T).masked_fill(~self.counts, -torch.inf)
        return torch.cat([keys @ self.shared.T, others], 1) + biases[:, None]


def initial_patches(queries: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys ``q / |q|²``, which fire with 1 on their queries ``[n, d]``, biases 0, and values."""
    keys = queries / queries.square().sum(1, keepdim=True).clamp(min=1e-12)
    return keys, torch.zeros_like(keys[:, 0]), values


def train_patches(
    passes: LastBlockPasses, memory: PatchMemory, values: Tensor, settings: TPatcherSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train one patch for each place, independently of the others.

    A patch is finished once its answer token has a loss below ``stop_loss`` and it is silent on all
    of its memory.

    Args:
        passes: Passes through the last block at the places.
        memory: What the patches shall be silent on.
        values: What the values start from, in units of ``amplify``. Shape ``[n, d_out]``.
        settings: The settings.

    Returns:
        Keys, biases and values of the patches, and the last loss of each token, ``[n]``.
    """
    queries = passes.queries
    leaves = [tensor.requires_grad_() for tensor in initial_patches(queries, values)]
    final = [leaf.detach().clone() for leaf in leaves]
    # Of the shared memory alone, so that it does not depend on what is trained together.
    top = max(1, round(settings.top_share * len(memory.shared)))
    optimizer = torch.optim.Adam(leaves, lr=settings.lr, weight_decay=settings.weight_decay)
    active, losses = torch.arange(len(values), device=values.device), torch.zeros_like(final[1])
    for step in range(settings.steps + 1 if len(values) else 0):
        keys, biases, scaled = (leaf[active] for leaf in leaves)
        activations = (passes.queries * keys).sum(1) + biases
        change = activations.relu()[:, None] * settings.amplify * scaled
        logs = passes.run(change).to(change.dtype).log_softmax(-1)
        nll = -logs.gather(-1, passes.targets[:, None])[:, 0]
        scores = memory.scores(keys, biases)
        silence = memory_loss(scores, activations, settings.margin, top)
        loss = nll + settings.activation_weight * activation_loss(activations)
        loss = check_finite(
            "loss of patches", passes.place.writes, loss + settings.memory_weight * silence
        )
        losses[active] = nll.detach()
        # Finished patches stay as they are here; what Adam does to their leaves is not read.
        for whole, leaf in zip(final, leaves, strict=True):
            whole[active] = leaf.detach()[active]
        done = (nll < settings.stop_loss) & ~(scores > 0).any(1)
        if step == settings.steps or bool(done.all()):
            break
        kept = (~done | torch.full_like(done, not passes.apart)).nonzero()[:, 0]
        gradients = torch.autograd.grad(loss[kept].sum(), leaves)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        if len(kept) < len(active):
            active, passes, memory = active[kept], passes.select(kept), memory.select(kept)
    keys, biases, scaled = final
    return keys, biases, settings.amplify * scaled, losses
