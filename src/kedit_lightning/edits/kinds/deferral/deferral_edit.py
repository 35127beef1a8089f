"""Edits of a gate and of the copy of a layer that it defers to (DEFER)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor

from kedit_lightning.edits.edit import EditableModel, MemoryEdit, Tensors, Values, check_finite
from kedit_lightning.edits.effects import Effect, RouteRows, RowFunction, contents_of
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

#: Gate from which on a row is answered by the copy, itself included.
GATE = 0.5


class Deferral(NamedTuple):
    """A gate ``σ(w·x + c)``, and what the copy of a layer changes, ``y + x Δᵀ + b``.

    Args:
        gate: ``w``. Shape ``[d_in]``.
        gate_bias: ``c``. Shape ``[1]``.
        change: ``Δ``. Shape ``[d_out, d_in]``.
        bias: ``b``. Shape ``[d_out]``.
    """

    gate: Tensor
    gate_bias: Tensor
    change: Tensor
    bias: Tensor

    @classmethod
    def zero(cls, d_in: int, d_out: int, dtype: torch.dtype, device: torch.device) -> Deferral:
        """A gate at one half, and the layer as it is."""
        shapes = (d_in,), (1,), (d_out, d_in), (d_out,)
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))

    def to(self, target: torch.device | torch.dtype) -> Deferral:
        """The same on a device, or in a dtype."""
        return Deferral(*(tensor.to(target) for tensor in self))

    def plus(self, other: Deferral, sign: float = 1.0) -> Deferral:
        """The sum, or the difference, part by part."""
        return Deferral(*(a + sign * b for a, b in zip(self, other, strict=True)))

    def openness(self, queries: Tensor) -> Tensor:
        """The gate of each row, ``[batch]``, of inputs ``[batch, d_in]``."""
        return torch.sigmoid(queries.to(self.gate) @ self.gate + self.gate_bias)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """What the copy gives, ``[..., d_out]``, where the layer maps ``x`` to ``y``."""
        return y.to(self.change.dtype) + x.to(self.change.dtype) @ self.change.T + self.bias

    def route(self, queries: Tensor) -> Tensor:
        """Which rows are answered by the copy. Bool, shape ``[batch]``."""
        return self.openness(queries) >= GATE

    def replace(self, x: Tensor, y: Tensor, chosen: Tensor, end: Tensor | None) -> Tensor:
        """The output, with that of the copy in the chosen rows from their last prompt token on."""
        rows = chosen.nonzero()[:, 0]
        return put_rows(y, rows, self.output(x[rows], y[rows]), end) if len(rows) else y


class _Values(TypedDict):
    module: str


class DeferralEdit(MemoryEdit):
    """A share of a gate and of the copy behind it; all such edits of a module are added up.

    Rolling one back takes out its share alone.

    Args:
        base: The base model.
        module: The projection that is copied.
        share: What the edit adds.
        origin: Where the edit comes from.
    """

    kind: ClassVar[str] = "deferral"

    def __init__(
        self,
        base: EditableModel,
        module: str,
        share: Deferral,
        origin: EditOrigin | None = None,
    ) -> None:
        super().__init__(base, origin)
        self.module = module
        self.share = Deferral(*(tensor.detach() for tensor in share))
        d_in, d_out = projection_shape(check_editable(base.model, module))
        shapes = [tuple(tensor.shape) for tensor in share]
        if shapes != [(d_in,), (1,), (d_out, d_in), (d_out,)]:
            raise EditFileError(
                f"a deferral of shapes {shapes} does not fit module '{module}', which maps {d_in} "
                f"to {d_out} values"
            )
        for name, tensor in self.share._asdict().items():
            check_finite(f"deferral's {name}", module, tensor)

    @property
    def family(self) -> tuple[str, str]:
        """The gate that this edit is part of."""
        return self.family_of(self.module)

    @classmethod
    def family_of(cls, module: str) -> tuple[str, str]:
        """The gate of a module."""
        return (cls.kind, module)

    def effects(self) -> Sequence[Effect]:
        """The routing of rows by the gate that all such edits form."""
        return [RouteRows(self.module, self.family, self._build, [self.share])]

    def _build(self, shares: Sequence[Deferral]) -> RowFunction:
        device = device_of(find_module(self.base.model, self.module))
        whole = reduce(Deferral.plus, shares).to(device)
        return routed(self.family, whole.route, whole.replace)

    def state(self) -> tuple[Tensors, Values]:
        """The parts of the share; the module as a plain value."""
        return self.share._asdict(), {"module": self.module}

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> DeferralEdit:
        """Rebuild the edit."""
        check_value("the deferral", values, _Values)
        check_names("the deferral", tensors, Deferral._fields)
        for name, sizes in zip(Deferral._fields, (1, 1, 2, 1), strict=True):
            check_tensor(name, tensors[name], (None,) * sizes, FULL_PRECISION)
        return cls(base, values["module"], Deferral(**tensors), origin)


def stacked_deferral(base: EditableModel, module: str) -> Deferral | None:
    """The gate and the copy that the applied edits of a module form."""
    family = DeferralEdit.family_of(module)
    routes = [effect for effect in base.edits.effects(RouteRows) if effect.family == family]
    return reduce(Deferral.plus, contents_of(routes)) if routes else None
