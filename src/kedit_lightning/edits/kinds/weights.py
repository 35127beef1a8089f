"""Edits of weights: low-rank, dense, and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from kedit_lightning.edits.edit import Edit, EditableModel, EditOrigin, check_finite
from kedit_lightning.edits.effects import DensePatch, LowRankPatch, Patch
from kedit_lightning.edits.low_rank import LowRankDelta
from kedit_lightning.edits.projections import check_editable, oriented, projection_shape
from kedit_lightning.errors import EditFileError, UnsupportedUseError

#: Start of the names of memory tensors; the names of modules hold no slash.
_MEMORY = "memory/"


class LowRankEdit(Edit):
    """Adds a product of two thin matrices to some projections.

    Args:
        base: The base model.
        factors: ``(A, B)`` by module name, with ``A`` of shape ``[rank, d_in]`` and ``B`` of shape
            ``[d_out, rank]``; the module's output becomes ``y + (x Aᵀ) Bᵀ``.
        origin: Where the edit comes from.
        memory: What later edits of the same method read: keys already written, running statistics.
            It has no effect on the model.  An edit with a memory was computed from those of the
            edits below it, so it is refused on any other stack.

    Raises:
        UnsupportedUseError: A module cannot be changed by a weight edit.
        NonFiniteError: A factor or a memory holds NaN or infinity.
    """

    kind: ClassVar[str] = "low_rank"

    def __init__(
        self,
        base: EditableModel,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        origin: EditOrigin | None = None,
        memory: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(base, origin)
        self.memory = {name: tensor.detach() for name, tensor in (memory or {}).items()}
        for name, tensor in self.memory.items():
            check_finite("memory", name, tensor)
        self.factors = {n: LowRankDelta(a.detach(), b.detach()) for n, (a, b) in factors.items()}
        for name, (a, b) in self.factors.items():
            module = check_editable(base.model, name)
            if (a.shape[1], b.shape[0]) != projection_shape(module) or a.shape[0] != b.shape[1]:
                raise EditFileError(
                    f"factors of shape {tuple(a.shape)} and {tuple(b.shape)} do not fit module "
                    f"'{name}', which maps {projection_shape(module)[0]} to "
                    f"{projection_shape(module)[1]} values"
                )
            check_finite("low-rank update", name, a)
            check_finite("low-rank update", name, b)

    @property
    def requires_its_stack(self) -> bool:
        """Whether the edit was computed from the memories of the edits below it."""
        return bool(self.memory)

    def patches(self) -> dict[str, Patch]:
        """One low-rank patch a module."""
        return {name: LowRankPatch(a, b) for name, (a, b) in self.factors.items()}

    def deltas(self) -> dict[str, Tensor]:
        """Dense change of each weight, in the weight's own orientation."""
        return {
            f"{name}.weight": oriented(b @ a, self.base.model.get_submodule(name))
            for name, (a, b) in self.factors.items()
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The factors and the memory."""
        tensors = {f"{name}.A": a for name, (a, _) in self.factors.items()}
        tensors |= {f"{name}.B": b for name, (_, b) in self.factors.items()}
        return tensors | {f"{_MEMORY}{name}": held for name, held in self.memory.items()}, {}

    @classmethod
    def from_state(
        cls,
        base: EditableModel,
        origin: EditOrigin,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
    ) -> LowRankEdit:
        """Rebuild from the factors and the memory."""
        memory = {n.removeprefix(_MEMORY): t for n, t in tensors.items() if n.startswith(_MEMORY)}
        own = tensors.keys() - {f"{_MEMORY}{name}" for name in memory}
        names = sorted(name.removesuffix(".A") for name in own if name.endswith(".A"))
        factors = {n: (tensors[f"{n}.A"], tensors[f"{n}.B"]) for n in names}
        return cls(base, factors, origin, memory)


def memories(base: EditableModel, method: str) -> list[dict[str, Tensor]]:
    """What the applied edits of a method remember, oldest first.

    It follows from the stack alone: an edit that is rolled back is remembered no longer.
    """
    parts = [part for edit in base.edits for part in edit.parts() if isinstance(part, LowRankEdit)]
    return [part.memory for part in parts if part.memory and part.origin.method == method]


class AdapterEdit(LowRankEdit):
    """A LoRA adapter that was trained with peft and unloaded, attached like any low-rank edit.

    The scaling of the adapter is part of ``B``.
    """

    kind: ClassVar[str] = "adapter"


class DenseEdit(Edit):
    """Adds a dense matrix, and perhaps a bias, to some projections.

    Args:
        base: The base model.
        changes: ``(delta, bias)`` by module name, with ``delta`` of shape ``[d_out, d_in]`` (or
            ``None``) and ``bias`` of shape ``[d_out]`` (or ``None``).
        origin: Where the edit comes from.

    Raises:
        UnsupportedUseError: A module cannot be changed by a weight edit.
        NonFiniteError: A change holds NaN or infinity.
    """

    kind: ClassVar[str] = "dense"

    def __init__(
        self,
        base: EditableModel,
        changes: Mapping[str, tuple[Tensor | None, Tensor | None]],
        origin: EditOrigin | None = None,
    ) -> None:
        super().__init__(base, origin)
        self.changes = {
            name: (_detached(delta), _detached(bias)) for name, (delta, bias) in changes.items()
        }
        for name, change in self.changes.items():
            module = check_editable(base.model, name)
            d_in, d_out = projection_shape(module)
            if change[1] is not None and getattr(module, "bias", None) is None:
                raise UnsupportedUseError(
                    f"module '{name}' has no bias that an edit could change; change its weight only"
                )
            for part, quantity, shape in zip(
                change, ("dense update", "bias update"), ((d_out, d_in), (d_out,)), strict=True
            ):
                if part is None:
                    continue
                if tuple(part.shape) != shape:
                    raise EditFileError(
                        f"a {quantity} of shape {tuple(part.shape)} does not fit module '{name}', "
                        f"which needs {shape}"
                    )
                check_finite(quantity, name, part)

    def patches(self) -> dict[str, Patch]:
        """One dense patch a module."""
        return {name: DensePatch(delta, bias) for name, (delta, bias) in self.changes.items()}

    def deltas(self) -> dict[str, Tensor]:
        """Change of each weight and bias, in the parameter's own orientation."""
        found: dict[str, Tensor] = {}
        for name, (delta, bias) in self.changes.items():
            if delta is not None:
                found[f"{name}.weight"] = oriented(delta, self.base.model.get_submodule(name))
            if bias is not None:
                found[f"{name}.bias"] = bias
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The matrices and biases."""
        tensors: dict[str, Tensor] = {}
        for name, (delta, bias) in self.changes.items():
            if delta is not None:
                tensors[f"{name}.delta"] = delta
            if bias is not None:
                tensors[f"{name}.bias"] = bias
        return tensors, {}

    @classmethod
    def from_state(
        cls,
        base: EditableModel,
        origin: EditOrigin,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
    ) -> DenseEdit:
        """Rebuild from the matrices and biases."""
        names = sorted({name.rpartition(".")[0] for name in tensors})
        changes = {n: (tensors.get(f"{n}.delta"), tensors.get(f"{n}.bias")) for n in names}
        return cls(base, changes, origin)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
