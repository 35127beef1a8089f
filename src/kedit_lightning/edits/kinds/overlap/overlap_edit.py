"""Edits that share a residual memory beside one projection (MEMOIR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor

from kedit_lightning.edits.edit import EditableModel, MemoryEdit, Tensors, Values, check_finite
from kedit_lightning.edits.effects import Effect, RouteRows, RowFunction, contents_of
from kedit_lightning.edits.kinds.overlap.top_hash import feature_order, overlaps, top_hash
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.projections import check_editable, find_module, projection_shape
from kedit_lightning.edits.prompt_routing import put_rows, routed
from kedit_lightning.edits.state_schema import (
    FULL_PRECISION,
    check_names,
    check_tensor,
    check_value,
)
from kedit_lightning.edits.weight_storage import device_of
from kedit_lightning.errors import EditFileError


@dataclass(frozen=True)
class OverlapPlan:
    """What all edits of a residual memory share.

    Args:
        module: Name of the projection.
        active: Features in a mask.
        order_seed: Seed of the permutation of features.
        threshold: Overlap from which on a prompt counts as one of the facts'.
    """

    module: str
    active: int
    order_seed: int = 0
    threshold: float = 0.6

    def masks(self, keys: Tensor, centre: Tensor) -> Tensor:
        """Masks ``[n, d_in]`` of inputs of the projection ``[n, d_in]``."""
        features = keys.to(centre) - centre
        return top_hash(features, self.active, feature_order(len(centre), self.order_seed))


class _Values(TypedDict):
    plan: OverlapPlan


class ResidualMemory(NamedTuple):
    """The memory that the edits of a family form.

    Args:
        plan: The plan of the edits.
        change: The memory's weights. Shape ``[d_out, d_in]``.
        masks: Masks of all facts, oldest first. Shape ``[n, d_in]``.
        centre: Mean input of irrelevant prompts. Shape ``[d_in]``.
    """

    plan: OverlapPlan
    change: Tensor
    masks: Tensor
    centre: Tensor

    def route(self, queries: Tensor) -> Tensor:
        """The fact with the largest overlap, ``-1`` where none is known. ``[batch]``.

        Of several with the same overlap the newest answers.
        """
        found = overlaps(self.plan.masks(queries, self.centre), self.masks).flip(1)
        largest = found.max(dim=1)
        index = found.shape[1] - 1 - largest.indices
        return torch.where(largest.values >= self.plan.threshold, index, -1)

    def add(self, x: Tensor, y: Tensor, index: Tensor, end: Tensor | None) -> Tensor:
        """The output with the columns of each row's fact, from its last prompt token on."""
        rows = (index >= 0).nonzero()[:, 0]
        if not len(rows):
            return y
        new = residual_output(x[rows], y[rows], self.change, self.masks[index[rows]])
        return put_rows(y, rows, new, end)


def residual_output(x: Tensor, y: Tensor, change: Tensor, masks: Tensor) -> Tensor:
    """Output ``y + (x ⊙ m) Wᵀ``, ``[n, tokens, d_out]``, added in the dtype of the memory.

    Args:
        x: Shape ``[n, tokens, d_in]``.
        y: Shape ``[n, tokens, d_out]``.
        change: The memory ``W``. Shape ``[d_out, d_in]``.
        masks: The mask of each row. Shape ``[n, d_in]``.
    """
    kept = x.to(change.dtype) * masks.to(change)[:, None]
    return (y.to(change.dtype) + kept @ change.T).to(y.dtype)


class OverlapEdit(MemoryEdit):
    """Facts of a residual memory; all applied edits with one plan form the memory.

    Each edit holds what it adds, in the columns of its masks.  The memory is their sum, so rolling
    one back takes out its own share alone.

    Args:
        base: The base model.
        plan: What the edits of the memory share.
        masks: The mask of each fact. Bool, shape ``[n, d_in]``.
        values: What the edit adds in the columns that a mask has, ``[d_out, columns]``.
        centre: Mean input of irrelevant prompts. Shape ``[d_in]``.
        origin: Where the edit comes from.
    """

    kind: ClassVar[str] = "overlap"

    def __init__(
        self,
        base: EditableModel,
        plan: OverlapPlan,
        masks: Tensor,
        values: Tensor,
        centre: Tensor,
        origin: EditOrigin | None = None,
    ) -> None:
        super().__init__(base, origin)
        self.plan, self.masks = plan, masks.detach()
        self.values, self.centre = values.detach(), centre.detach()
        d_in, d_out = projection_shape(check_editable(base.model, plan.module))
        columns = int(self.masks.any(0).sum())
        fits = masks.dim() == 2 and masks.shape[1] == d_in and centre.shape == (d_in,)
        if not fits or not len(masks) or values.shape != (d_out, columns):
            raise EditFileError(
                f"a residual memory of masks {tuple(masks.shape)} and values "
                f"{tuple(values.shape)} does not fit module '{plan.module}', which maps {d_in} to "
                f"{d_out} values, {columns} of them in the masks"
            )
        check_finite("residual memory", plan.module, self.values)
        check_finite("residual memory's centre", plan.module, self.centre)

    @property
    def family(self) -> tuple[str, OverlapPlan]:
        """The memory that this edit is part of."""
        return self.family_of(self.plan)

    @classmethod
    def family_of(cls, plan: OverlapPlan) -> tuple[str, OverlapPlan]:
        """The memory of edits with a plan."""
        return (cls.kind, plan)

    @property
    def change(self) -> Tensor:
        """What the edit adds to the memory, ``[d_out, d_in]``; zero outside its masks."""
        dense = self.values.new_zeros(len(self.values), self.masks.shape[1])
        dense[:, self.masks.any(0)] = self.values
        return dense

    def effects(self) -> Sequence[Effect]:
        """The routing of rows by the memory that all such edits form."""
        return [RouteRows(self.plan.module, self.family, self._build, [self])]

    def _build(self, edits: Sequence[OverlapEdit]) -> RowFunction:
        module = find_module(self.base.model, self.plan.module)
        memory = residual_memory(edits, device_of(module))
        return routed(self.family, memory.route, memory.add)

    def state(self) -> tuple[Tensors, Values]:
        """Masks, values and centre; the plan as plain values."""
        tensors = {"masks": self.masks, "values": self.values, "centre": self.centre}
        return tensors, {"plan": asdict(self.plan)}

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> OverlapEdit:
        """Rebuild the edit."""
        check_value("the residual memory", values, _Values)
        check_names("the residual memory", tensors, ("masks", "values", "centre"))
        check_tensor("masks", tensors["masks"], (None, None), (torch.bool,))
        check_tensor("values", tensors["values"], (None, None), FULL_PRECISION)
        check_tensor("centre", tensors["centre"], (None,), FULL_PRECISION)
        plan = OverlapPlan(**values["plan"])
        if not 0 < plan.active <= len(tensors["centre"]):
            raise EditFileError(f"a residual memory cannot have {plan.active} active features")
        return cls(base, plan, tensors["masks"], tensors["values"], tensors["centre"], origin)


def residual_memory(edits: Sequence[OverlapEdit], device: torch.device) -> ResidualMemory:
    """The memory that edits with one plan form, a pure function of them and their order."""
    change = edits[0].change
    for edit in edits[1:]:
        change = change + edit.change
    masks = torch.cat([edit.masks for edit in edits])
    return ResidualMemory(
        edits[0].plan, change.to(device), masks.to(device), edits[0].centre.to(device)
    )


def stacked_overlap_edits(base: EditableModel, plan: OverlapPlan) -> list[OverlapEdit]:
    """The applied edits with a plan, oldest first."""
    family = OverlapEdit.family_of(plan)
    routes = [effect for effect in base.edits.effects(RouteRows) if effect.family == family]
    return contents_of(routes)
