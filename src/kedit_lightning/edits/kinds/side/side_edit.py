"""Edits that share side memories beside one projection (WISE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor

from kedit_lightning.edits.edit import EditableModel, MemoryEdit, Tensors, Values, check_finite
from kedit_lightning.edits.effects import Effect, RouteRows, RowFunction, contents_of
from kedit_lightning.edits.kinds.side.merging import Merge, merge_shards, shard_mask
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.projections import (
    check_editable,
    find_module,
    projection_shape,
)
from kedit_lightning.edits.prompt_routing import put_rows, routed
from kedit_lightning.edits.rounding import state_rounding
from kedit_lightning.edits.state_schema import (
    FULL_PRECISION,
    check_names,
    check_tensor,
    check_value,
)
from kedit_lightning.edits.weight_storage import device_of
from kedit_lightning.errors import EditFileError


@dataclass(frozen=True)
class SidePlan:
    """What all edits of a side memory share.

    Args:
        module: Name of the projection.
        mask_ratio: Share of the projection's entries that a shard may change.
        mask_seed: Seed of the masks, and of what DARE keeps.
        shards_per_memory: Shards that are merged into one memory; 0 merges all.
        merge: How they are merged.
        density: Share of the entries that pruning keeps.
        activation_ratio: A memory answers a prompt whose activation is above this share of the
            smallest one among its own prompts.
    """

    module: str
    mask_ratio: float = 0.2
    mask_seed: int = 0
    shards_per_memory: int = 2
    merge: Merge = "ties"
    density: float = 0.53
    activation_ratio: float = 0.88

    def mask(self, shape: tuple[int, int], shard: int) -> Tensor:
        """Entries of a change ``[d_out, d_in]`` that a shard may use."""
        return shard_mask(shape, self.mask_ratio, self.mask_seed, shard)

    def memory_of(self, shard: int) -> int:
        """Number of the memory that a shard is merged into."""
        return shard // self.shards_per_memory if self.shards_per_memory else 0


class _Values(TypedDict):
    plan: SidePlan
    shard: int


class SideMemories(NamedTuple):
    """The memories that the edits of a family form.

    Args:
        changes: Change of the projection's output by each, ``[memories, d_out, d_in]``.
        thresholds: Activation above which each answers. Shape ``[memories]``.
    """

    changes: Tensor
    thresholds: Tensor

    def route(self, queries: Tensor) -> Tensor:
        """The memory of each row, ``-1`` for the main one. Shape ``[batch]``, of ``[batch, d_in]``.

        Of several memories whose threshold is exceeded the one with the largest activation answers.
        """
        found = activations(self.changes, queries.to(self.changes))
        largest = found.masked_fill(found <= self.thresholds, -torch.inf).max(dim=1)
        return torch.where(largest.values.isfinite(), largest.indices, -1)

    def add(self, x: Tensor, y: Tensor, index: Tensor, end: Tensor | None) -> Tensor:
        """Output ``[batch, tokens, d_out]`` with the change of each row's memory.

        It acts from the last prompt token on, whose columns ``[batch]`` are ``None`` in decode
        steps.  Rows without a memory, and earlier tokens, stay as they are to the last bit.
        """
        for memory in index[index >= 0].unique().tolist():
            rows = (index == memory).nonzero()[:, 0]
            y = put_rows(y, rows, side_output(x[rows], y[rows], self.changes[memory]), end)
        return y


def side_output(x: Tensor, y: Tensor, change: Tensor) -> Tensor:
    """Output ``y + x Δᵀ`` of a side memory, added in the dtype of ``Δ``, ``[d_out, d_in]``."""
    return (y.to(change.dtype) + x.to(change.dtype) @ change.T).to(y.dtype)


def activations(changes: Tensor, queries: Tensor) -> Tensor:
    """WISE's routing activation, the norm of a change of the output. Shape ``[batch, memories]``.

    Args:
        changes: Shape ``[memories, d_out, d_in]``.
        queries: Inputs of the projection at the last prompt token. Shape ``[batch, d_in]``.
    """
    # One memory after another: a batched product may differ in the last bits with their number.
    return torch.stack([(queries @ change.T).norm(dim=-1) for change in changes], dim=1)


class SideEdit(MemoryEdit):
    """Facts in a shard of a side memory; all applied edits with one plan form the memories.

    Each edit holds what it adds to its shard.  The memories are computed from the edits on the
    stack, in order, so rolling one back takes out its own share alone.

    Args:
        base: The base model.
        plan: What the edits of the memory share.
        shard: Number of the shard.
        values: Change of the entries in the shard's mask, in the order of ``[d_out, d_in]``.
        keys: Inputs of the projection at the last tokens of the edit's prompts, ``[n, d_in]``.
        origin: Where the edit comes from.
    """

    kind: ClassVar[str] = "side"

    def __init__(
        self,
        base: EditableModel,
        plan: SidePlan,
        shard: int,
        values: Tensor,
        keys: Tensor,
        origin: EditOrigin | None = None,
    ) -> None:
        super().__init__(base, origin)
        self.plan, self.shard = plan, shard
        self.values, self.keys = values.detach(), keys.detach()
        d_in, d_out = projection_shape(check_editable(base.model, plan.module))
        self._shape = (d_out, d_in)
        wanted = int(plan.mask(self._shape, shard).sum())
        if values.shape != (wanted,) or keys.dim() != 2 or keys.shape[1] != d_in or not len(keys):
            raise EditFileError(
                f"a side memory of {tuple(values.shape)} values and {tuple(keys.shape)} keys does "
                f"not fit module '{plan.module}', which maps {d_in} to {d_out} values, {wanted} of "
                "them in the mask"
            )
        check_finite("side memory", plan.module, self.values)
        check_finite("side memory's keys", plan.module, self.keys)

    @property
    def family(self) -> tuple[str, SidePlan]:
        """The memories that this edit is part of."""
        return self.family_of(self.plan)

    @classmethod
    def family_of(cls, plan: SidePlan) -> tuple[str, SidePlan]:
        """The memories of edits with a plan."""
        return (cls.kind, plan)

    @property
    def change(self) -> Tensor:
        """What the edit adds to its shard, ``[d_out, d_in]``; zero outside the mask."""
        mask = self.plan.mask(self._shape, self.shard).to(self.values.device)
        return self.values.new_zeros(self._shape).masked_scatter(mask, self.values)

    def effects(self) -> Sequence[Effect]:
        """The routing of rows by the memories that all such edits form."""
        return [RouteRows(self.plan.module, self.family, self._build, [self])]

    def _build(self, edits: Sequence[SideEdit]) -> RowFunction:
        device = device_of(find_module(self.base.model, self.plan.module))
        memories = side_memories(self.plan, edits, device, state_rounding(self.base.dtype))
        return routed(self.family, memories.route, memories.add)

    def state(self) -> tuple[Tensors, Values]:
        """Values and keys; plan and shard as plain values."""
        tensors = {"values": self.values, "keys": self.keys}
        return tensors, {"plan": asdict(self.plan), "shard": self.shard}

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> SideEdit:
        """Rebuild the edit."""
        check_value("the side memory", values, _Values)
        check_names("the side memory", tensors, ("values", "keys"))
        check_tensor("values", tensors["values"], (None,), FULL_PRECISION)
        check_tensor("keys", tensors["keys"], (None, None), FULL_PRECISION)
        plan = SidePlan(**values["plan"])
        if not (0 < plan.mask_ratio <= 1 and 0 < plan.density <= 1 and plan.shards_per_memory >= 0):
            raise EditFileError(f"a side memory cannot have the plan {plan}")
        return cls(base, plan, values["shard"], tensors["values"], tensors["keys"], origin)


def shard_changes(edits: Sequence[SideEdit]) -> dict[int, Tensor]:
    """The change of each shard, ``[d_out, d_in]``: the sum of what its edits add, in order."""
    shards: dict[int, Tensor] = {}
    for edit in edits:
        change = edit.change
        shards[edit.shard] = shards[edit.shard] + change if edit.shard in shards else change
    return shards


def side_memories(
    plan: SidePlan, edits: Sequence[SideEdit], device: torch.device, rounding: float = 0.0
) -> SideMemories:
    """The memories that edits form, a pure function of them and their order.

    Args:
        plan: The plan of the edits.
        edits: At least one edit.
        device: Where the memories are needed.
        rounding: Relative distance within which activations are equal.
    """
    shards = shard_changes(edits)
    groups: dict[int, list[int]] = {}
    for shard in sorted(shards):
        groups.setdefault(plan.memory_of(shard), []).append(shard)
    changes, thresholds = [], []
    for number, members in groups.items():
        seed = plan.mask_seed + number
        merged = merge_shards([shards[s] for s in members], plan.merge, plan.density, seed)
        keys = torch.cat([e.keys for e in edits if plan.memory_of(e.shard) == number])
        least = activations(merged[None], keys.to(merged)).min()
        changes.append(merged)
        thresholds.append(plan.activation_ratio * (1 - rounding) * least)
    return SideMemories(torch.stack(changes).to(device), torch.stack(thresholds).to(device))


def stacked_side_edits(base: EditableModel, plan: SidePlan) -> list[SideEdit]:
    """The applied edits with a plan, oldest first."""
    family = SideEdit.family_of(plan)
    routes = [effect for effect in base.edits.effects(RouteRows) if effect.family == family]
    return contents_of(routes)
