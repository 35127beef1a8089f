"""Edits of weights: low-rank, dense, and adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from kedit_lightning.edits.edit import Edit, EditableModel, Tensors, Values, check_finite
from kedit_lightning.edits.effects import AddToOutput, Effect, KeepMemory, WeightDelta
from kedit_lightning.edits.low_rank import LowRankDelta
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.projections import check_editable, projection_shape
from kedit_lightning.edits.state_schema import NoValues, check_names, check_tensor, check_value
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
        memory: Tensors that later edits of the same method read: keys already written, running
            statistics.  An edit with a memory is refused on any stack but its own.

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
            d_in, d_out = projection_shape(check_editable(base.model, name))
            if (a.shape[1], b.shape[0]) != (d_in, d_out) or a.shape[0] != b.shape[1]:
                raise EditFileError(
                    f"factors of shape {tuple(a.shape)} and {tuple(b.shape)} do not fit module "
                    f"'{name}', which maps {d_in} to {d_out} values"
                )
            check_finite("low-rank update", name, a)
            check_finite("low-rank update", name, b)

    def effects(self) -> Sequence[Effect]:
        """One change a module, and the memory if there is one."""
        memory = [KeepMemory(self.origin.method, self.memory)] if self.memory else []
        return [*(AddToOutput(n, WeightDelta(delta)) for n, delta in self.factors.items()), *memory]

    def state(self) -> tuple[Tensors, Values]:
        """The factors and the memory."""
        tensors = {f"{name}.A": a for name, (a, _) in self.factors.items()}
        tensors |= {f"{name}.B": b for name, (_, b) in self.factors.items()}
        return tensors | {f"{_MEMORY}{name}": kept for name, kept in self.memory.items()}, {}

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> LowRankEdit:
        """Rebuild from the factors and the memory."""
        check_value("the edit", values, NoValues)
        memory = {n.removeprefix(_MEMORY): t for n, t in tensors.items() if n.startswith(_MEMORY)}
        others = tensors.keys() - {f"{_MEMORY}{name}" for name in memory}
        names = sorted(name.removesuffix(".A") for name in others if name.endswith(".A"))
        check_names("the edit", others, [f"{name}.{factor}" for name in names for factor in "AB"])
        for name in others:
            check_tensor(name, tensors[name], (None, None))
        factors = {n: (tensors[f"{n}.A"], tensors[f"{n}.B"]) for n in names}
        return cls(base, factors, origin, memory)


def memories(base: EditableModel, method: str) -> list[dict[str, Tensor]]:
    """Memories of the applied edits of a method, oldest first; a rollback removes its memory."""
    return [m.tensors for m in base.edits.effects(KeepMemory) if m.method == method]


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
            n: (_detached(delta), _detached(bias)) for n, (delta, bias) in changes.items()
        }
        for name, (delta, bias) in self.changes.items():
            module = check_editable(base.model, name)
            d_in, d_out = projection_shape(module)
            if bias is not None and getattr(module, "bias", None) is None:
                raise UnsupportedUseError(
                    f"module '{name}' has no bias that an edit could change; change its weight only"
                )
            dense, vector = ("dense update", (d_out, d_in)), ("bias update", (d_out,))
            for part, (quantity, shape) in ((delta, dense), (bias, vector)):
                if part is not None and tuple(part.shape) != shape:
                    raise EditFileError(
                        f"a {quantity} of shape {tuple(part.shape)} does not fit module '{name}', "
                        f"which needs {shape}"
                    )
                if part is not None:
                    check_finite(quantity, name, part)

    def effects(self) -> Sequence[Effect]:
        """One change a module."""
        return [AddToOutput(n, WeightDelta(None, *change)) for n, change in self.changes.items()]

    def state(self) -> tuple[Tensors, Values]:
        """The matrices and biases."""
        pairs = [(n, zip(("delta", "bias"), pair, strict=True)) for n, pair in self.changes.items()]
        return {f"{n}.{part}": t for n, pair in pairs for part, t in pair if t is not None}, {}

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> DenseEdit:
        """Rebuild from the matrices and biases."""
        check_value("the edit", values, NoValues)
        check_names("the edit", [n for n in tensors if not n.endswith((".delta", ".bias"))], ())
        for name, tensor in tensors.items():
            check_tensor(name, tensor, (None, None) if name.endswith(".delta") else (None,))
        names = sorted({name.rpartition(".")[0] for name in tensors})
        changes = {n: (tensors.get(f"{n}.delta"), tensors.get(f"{n}.bias")) for n in names}
        return cls(base, changes, origin)


def _detached(tensor: Tensor | None) -> Tensor | None:
    # As a file gives it back: products with another layout round otherwise.
    return None if tensor is None else tensor.detach().contiguous()
