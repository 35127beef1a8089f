"""Null-space constrained editing (AlphaEdit, Fang et al. 2025, arXiv 2410.02355)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.mixture import single_experts
from kedit_lightning.methods.capabilities import NotNegative, Share
from kedit_lightning.methods.locate.shared.closed_form import ClosedForm
from kedit_lightning.methods.locate.shared.closed_form_settings import LayersSettings
from kedit_lightning.methods.locate.shared.least_squares import Prior, null_space_prior


@dataclass(frozen=True)
class AlphaEditSettings(LayersSettings):
    """Settings of :class:`AlphaEdit`."""

    energy: Share
    threshold: NotNegative | None
    size_cost: NotNegative
    legacy_size_cost: NotNegative | None
    weighs_text: ClassVar[bool] = False


class AlphaEdit(ClosedForm):
    """MEMIT inside the null space of the keys of plain text, which keeps earlier edits as well.

    The keys of earlier edits are a recursive least-squares state that follows from the stack.  The
    null space stands in for ``preserve`` and ``ridge``, which have no part in it.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks whose MLPs are edited.
        energy: Share of the energy of the keys that the null space may hold.
        threshold: Largest eigenvalue inside the null space, instead of a share; the paper has 0.02
            in the units of three models' keys.
        size_cost: Cost of the size of the change inside the null space (``L2`` of the paper), in
            mean squared norms of keys there.
        legacy_size_cost: The same in absolute units, as published: 10, or 1 for some models.
        **settings: Those of all closed-form methods.
    """

    settings_type = AlphaEditSettings
    settings: AlphaEditSettings
    published = "AlphaEdit"
    keeps_history = True

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

    def prior(self, layer: int) -> Prior:
        """A change lies in the null space, and costs its size there."""
        settings, down = self.settings, self.base.layout.mlp_block(layer).down
        parts = single_experts(self.base.model, down)
        # The keys of experts stand in a row, so that their norms add up.
        scale = self.covariances.scale_inside(parts, settings.energy, settings.threshold)
        cost = settings.legacy_size_cost
        cost = settings.size_cost * scale if cost is None else cost

        def of_one(module: str) -> Prior:
            basis, _ = self.covariances.null_space(module, settings.energy, settings.threshold)
            return null_space_prior(basis.to(self.base.device), cost)

        return self.covariances.blockwise(down, of_one)
