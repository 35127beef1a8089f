"""Null-space constrained editing (AlphaEdit, Fang et al. 2025, arXiv 2410.02355)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.locate.shared.closed_form import ClosedForm
from kedit_lightning.methods.locate.shared.locate_defaults import ALPHAEDIT_PUBLISHED
from kedit_lightning.methods.locate.shared.locate_method import Held
from kedit_lightning.methods.locate.shared.solve import Prior, null_space_prior
from kedit_lightning.statistics import main_directions


class AlphaEdit(ClosedForm):
    """MEMIT inside the null space of typical keys, which keeps earlier edits as well.

    The keys of earlier edits are a recursive least-squares state that follows from the stack.  The
    null space stands in for ``preserve`` and ``ridge``, which have no part in it.

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

    published = ALPHAEDIT_PUBLISHED
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
        self._avoided: Held[str] = Held()

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
        if self.hparams["statistics"] == "identity":  # nothing is known of typical keys
            return self._second_moment(module)[:, :0], 1.0
        return self._avoided.get(module, lambda: self._split(module))

    def _split(self, module: str) -> tuple[Tensor, float]:
        energy, threshold = self.hparams["energy"], self.hparams["threshold"]
        basis, values = main_directions(self._second_moment(module), energy, threshold)
        inside = float(values[: len(values) - basis.shape[1]].sum())
        if inside <= 0:
            raise UnsupportedUseError(
                f"nothing of the typical keys of layer '{module}' lies in the null space, so the "
                "size of a change there has no scale; raise energy, or use MEMIT"
            )
        return basis, inside
