"""Null-space constrained editing (AlphaEdit, Fang et al. 2025, arXiv 2410.02355)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.locate.closed_form import ClosedForm
from kedit_lightning.methods.locate.presets import MEMIT_PUBLISHED
from kedit_lightning.methods.locate.solve import Prior, null_space_prior


def main_directions(
    moment: Tensor, energy: float, threshold: float | None = None
) -> tuple[Tensor, Tensor]:
    """Directions of keys that a change must avoid, and all eigenvalues.

    Args:
        moment: Second moment of keys. Shape ``[d, d]``, float64.
        energy: Share of its trace that may lie outside the directions.
        threshold: Smallest eigenvalue of the directions, instead of a share.

    Returns:
        Orthonormal columns, ``[d, r]``, and the eigenvalues in rising order, ``[d]``.
    """
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    values = values.clamp(min=0)
    if threshold is not None:
        free = int((values < threshold).sum())
    else:
        free = int((values.cumsum(0) <= energy * values.sum()).sum())
    return vectors[:, free:].contiguous(), values


class AlphaEdit(ClosedForm):
    """MEMIT inside the null space of typical keys, which keeps earlier edits as well.

    The keys of earlier edits are a recursive least-squares state that follows from the stack.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks whose MLPs are edited.
        energy: Share of the energy of typical keys that the null space may hold.
        threshold: Largest eigenvalue inside the null space, instead of a share; the paper has 0.02
            in the units of three models' keys.
        size_cost: Cost of the size of the change inside the null space (``L2`` of the paper), in
            mean squared norms of keys there.
        legacy_size_cost: The same in absolute units, as published: 10, or 1 for some models.
        **settings: Those of all closed-form methods.
    """

    published = MEMIT_PUBLISHED
    remembers = True

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        energy: float = 0.2,
        threshold: float | None = None,
        size_cost: float = 0.1,
        legacy_size_cost: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, **settings)
        self._avoided: dict[str, tuple[Tensor, float]] = {}

    def prior(self, layer: int) -> Prior:
        """A change lies in the null space, and costs its size there."""
        basis, scale = self._null_space(self.base.layout.block(layer).down)
        cost = self.hparams["legacy_size_cost"]
        if cost is None:
            cost = self.hparams["size_cost"] * scale
        return null_space_prior(basis.to(self.base.device), cost)

    def forget_statistics(self) -> None:
        """Drop what comes from statistics that are replaced now."""
        super().forget_statistics()
        self._avoided.clear()

    def _null_space(self, module: str) -> tuple[Tensor, float]:
        """What a change must avoid, and the mean squared norm of typical keys outside of it."""
        if module not in self._avoided:
            moment = self._second_moment(module)
            if self.hparams["statistics"] == "identity":
                return moment[:, :0], 1.0  # nothing is known of typical keys
            basis, values = main_directions(
                moment, self.hparams["energy"], self.hparams["threshold"]
            )
            free = len(values) - basis.shape[1]
            if free == 0:
                raise UnsupportedUseError(
                    f"typical keys of layer '{module}' leave no null space: each of its "
                    f"{len(values)} directions is used; raise energy, or use MEMIT"
                )
            inside = float(values[:free].sum())
            self._avoided[module] = (basis, inside)
        return self._avoided[module]
