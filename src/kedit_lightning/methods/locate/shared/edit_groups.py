"""Groups of requests whose edits are solved together and stay independent of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import (
    CompositeEdit,
    DenseEdit,
    Edit,
    EditOrigin,
    LowRankEdit,
)
from kedit_lightning.edits.effects import WeightDelta
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.locate.shared.equations import Equation
from kedit_lightning.methods.locate.shared.least_squares import Prior, known_priors
from kedit_lightning.methods.locate.shared.subject_states import Carried
from kedit_lightning.requests import EditRequest


def add_to(changes: dict[str, WeightDelta], more: Mapping[str, WeightDelta]) -> None:
    """Add changes of projections to those of the same or of other projections."""
    for name, new in more.items():
        changes[name] = changes[name].plus(new) if name in changes else new


def remembered_keys(
    base: BaseModel, memories: Sequence[Mapping[str, Tensor]], module: str
) -> Tensor | None:
    """Keys of a module in memories of edits, oldest first. Shape ``[d_in, N]``, float64."""
    name = f"{module}.keys"
    # Those of edits that were read from files are on the CPU.
    keys = [m[name].to(base.device, torch.float64) for m in memories if name in m]
    return torch.cat(keys, dim=1) if keys else None


class EditGroups:
    """Collects the changes of each group of requests, layer by layer.

    Args:
        base: The base model.
        groups: The requests of each edit.
        sizes: Number of keys of each group; one a request when absent.
    """

    def __init__(
        self,
        base: BaseModel,
        groups: Sequence[Sequence[EditRequest]],
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.base, self.groups = base, groups
        self.requests = [request for group in groups for request in group]
        sizes = [len(group) for group in groups] if sizes is None else sizes
        #: Places of each group among the keys.
        self.parts = [slice(e - n, e) for n, e in zip(sizes, accumulate(sizes), strict=True)]
        #: The change of each projection so far, by group.
        self.changes: list[dict[str, WeightDelta]] = [{} for _ in groups]
        self.memories: list[dict[str, Tensor]] = [{} for _ in groups]
        #: What each edit was solved from, if that is kept.
        self.equations: list[dict[str, Tensor]] = [{} for _ in groups]
        #: Weight of keys of plain text in each projection, by group, where it follows from keys.
        self.weights: list[list[float]] = [[] for _ in groups]

    @contextmanager
    def in_force(self) -> Iterator[Carried]:
        """Apply the changes so far: of one group to all rows, of several to the rows of each."""
        edits = [self._edit(changes) if changes else None for changes in self.changes]
        if len(edits) > 1 and any(edits):
            yield [e for e, group in zip(edits, self.groups, strict=True) for _ in group]
            return
        with self.base.edits.restored():
            if edits[0] is not None:
                edits[0].apply()
            yield None

    def keep(self, part: slice, module: str, equation: Equation) -> None:
        """Put what the change of a module was solved from beside the edit of a group."""
        kept = equation.tensors(module, compute_dtype(self.base.dtype))
        self.equations[self.parts.index(part)] |= kept

    def remember(self, name: str, values: Tensor) -> None:
        """Put values at all keys, ``[..., n]``, into the memories of their edits."""
        for memory, part in zip(self.memories, self.parts, strict=True):
            memory[name] = values[..., part].contiguous()

    def changing(
        self, keys: Sequence[Tensor], prior: Prior
    ) -> Iterable[tuple[dict[str, WeightDelta], slice, list[float], Tensor, Prior]]:
        """Of each group its changes, its place among the keys, its weights, its keys and its prior.

        ``keys`` are those of each group, ``[d_in, n]``; its prior knows them.
        """
        known = known_priors(prior, keys)
        return zip(self.changes, self.parts, self.weights, keys, known, strict=True)

    def edits(self, origin: Callable[..., EditOrigin]) -> list[Edit]:
        """One edit for each group, with what later edits must know, and the weights as a note."""
        notes = [{"preserve": weights} if weights else {} for weights in self.weights]
        origins = [origin(group, **note) for group, note in zip(self.groups, notes, strict=True)]
        edits = list(map(self._edit, self.changes, origins, self.memories))
        for edit, changes, equations in zip(edits, self.changes, self.equations, strict=True):
            # A part of them solves no part of the edit again, as where one layer has experts.
            whole = all(f"{module}/keys" in equations for module in changes)
            edit.equations = equations if equations and whole else None
        return edits

    def _edit(
        self,
        changes: dict[str, WeightDelta],
        origin: EditOrigin | None = None,
        memory: dict[str, Tensor] | None = None,
    ) -> Edit:
        factors = {n: c.low_rank for n, c in changes.items() if c.low_rank is not None}
        dense = {n: (c.dense, None) for n, c in changes.items() if c.dense is not None}
        low_rank = LowRankEdit(self.base, factors, origin, memory)
        if not dense:
            return low_rank
        whole = DenseEdit(self.base, dense, origin)
        parts = [low_rank, whole]
        return CompositeEdit(self.base, parts, origin) if memory or factors else whole
