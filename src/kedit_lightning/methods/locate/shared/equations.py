"""What a change of a projection is solved from, and the solution without an edit below it.

An edit of a sequence asks that a projection give certain outputs at certain keys.  Edits below it
count in two places: the residuals are those outputs minus what the projection gives with them, and
the cost of a change may hold their keys.  So with keys and wanted outputs kept, the edit without
one of those below it is another solve, with residuals that make up for what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import LowRankDelta, LowRankEdit
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.locate.shared.least_squares import Prior

#: What edits remember for those above them, oldest first.
Memories: TypeAlias = Sequence[Mapping[str, Tensor]]
_PARTS = ("keys", "present", "residuals")


class Equation(NamedTuple):
    """What a change of one projection is solved from.

    Args:
        keys: The keys that are solved for. Shape ``[n, d_in]``.
        present: The keys at which the present outputs were read. Shape ``[n, d_in]``.
        residuals: Wanted minus present outputs. Shape ``[n, d_out]``.
    """

    keys: Tensor
    present: Tensor
    residuals: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], module: str, device: torch.device) -> Equation:
        """That of a module among the equations of an edit, in float64."""
        keys = tensors[f"{module}/keys"]
        parts = (tensors.get(f"{module}/{part}", keys) for part in _PARTS)
        return cls(*(part.to(device, torch.float64) for part in parts))

    def tensors(self, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same by name, on the CPU; present keys that are the keys are left out."""
        parts = self._asdict()
        if torch.equal(self.present, self.keys):
            del parts["present"]
        return {
            f"{module}/{name}": part.detach().to("cpu", dtype).contiguous().clone()
            for name, part in parts.items()
        }

    def without(self, missing: Tensor | None) -> Equation:
        """The equation of the same wanted outputs on a weight that lacks a change.

        Args:
            missing: The change. Shape ``[d_out, d_in]``; none where absent.
        """
        if missing is None:
            return self
        return self._replace(residuals=self.residuals + self.present @ missing.to(self.present).T)


class SolvingMethod(Protocol):
    """The part of a closed-form method that solves an edit again."""

    layers: tuple[int, ...]
    edited: tuple[str, ...]

    @property
    def base(self) -> BaseModel:
        """The base model."""

    def cost(self, layer: int, module: str, keys: Tensor, past: Memories) -> Prior:
        """The cost of a change at keys ``[d_in, n]``, with the memories of edits below it."""

    def solution(self, module: str, equation: Equation, prior: Prior) -> LowRankDelta:
        """The change of a module."""


def solved_again(
    method: SolvingMethod,
    edit: LowRankEdit,
    past: Memories,
    missing: Mapping[str, Tensor],
) -> LowRankEdit:
    """An edit as it would be on a model that lacks changes, with its keys and wanted outputs.

    Args:
        method: The method that computed the edit.
        edit: The edit, with its equations.
        past: Memories of the edits of the method that are below it now, oldest first.
        missing: Changes that the model had when the edit was computed, and lacks now.
            Shape ``[d_out, d_in]`` by module.
    """
    device, dtype = method.base.device, compute_dtype(method.base.dtype)
    deltas: dict[str, LowRankDelta] = {}
    kept: dict[str, Tensor] = {}
    for layer, module in zip(method.layers, method.edited, strict=True):
        equation = Equation.of(edit.equations or {}, module, device).without(missing.get(module))
        prior = method.cost(layer, module, equation.keys.T, past)
        deltas[module] = method.solution(module, equation, prior).to(dtype)
        kept |= equation.tensors(module, dtype)
    new = LowRankEdit(edit.base, deltas, edit.origin, edit.memory)
    new.equations = kept
    return new
