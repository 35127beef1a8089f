"""Editors of many facts at once: MEMIT (Meng et al. 2023), PMET (Li et al. 2024) and EMMET."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import LowRankDelta
from kedit_lightning.methods.capabilities import NotNegative
from kedit_lightning.methods.locate.shared.closed_form import ClosedForm
from kedit_lightning.methods.locate.shared.closed_form_settings import (
    LayerSettings,
    LayersSettings,
    layers_beside_attention,
)
from kedit_lightning.methods.locate.shared.equations import Equation
from kedit_lightning.methods.locate.shared.least_squares import Prior, ridge_update


class MEMIT(ClosedForm):
    """Mass-editing memory: spreads many facts over the MLPs of a few layers, by ridge regression.

    ``history`` makes it MEMIT_seq; with ``ridge`` and ``patience`` besides it is ENCORE.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks whose MLPs are edited.
        **settings: Those of all closed-form methods.
    """

    settings_type = LayersSettings
    settings: LayersSettings
    published = "MEMIT"

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, **settings)


@dataclass(frozen=True)
class PMETSettings(LayersSettings):
    """Settings of :class:`PMET`."""

    default_layers = staticmethod(layers_beside_attention)


class PMET(MEMIT):
    """MEMIT whose values are outputs of the MLP, optimised together with outputs of attention.

    The change of attention's output is optimised but not written.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks whose MLPs are edited.
        **settings: Those of all closed-form methods.
    """

    settings_type = PMETSettings
    settings: PMETSettings
    published = "PMET"
    site_of_values = "attention and mlp"
    spread = 0.5
    relaxed = True


@dataclass(frozen=True)
class EMMETSettings(LayerSettings):
    """Settings of :class:`EMMET`."""

    eps: NotNegative
    legacy_absolute_eps: bool


class EMMET(ClosedForm):
    """MEMIT with equality constraints, at one layer (Gupta et al. 2024, arXiv 2403.14236).

    ``preserve`` matters with ``legacy_absolute_eps`` only: it cancels out of a relative ``eps``.
    As published, equality is demanded for the key that stands for a fact, the mean over its
    contexts. The key of the prompt itself is another, so there the update may overshoot the value
    that was found, or fall short of it; :class:`RROME` solves for the mean key too.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layer: Block whose MLP is edited.
        eps: How far facts may be missed to keep other keys, relative to the mean of their
            ``kᵀ G⁻¹ k``; more where keys are nearly equal, as those of two wordings of a fact. 0
            demands equality, which facts about one subject cannot meet.
        legacy_absolute_eps: Take ``eps`` as it stands, as the published code does with 0.1; with 1
            it is MEMIT.
        **settings: Those of all closed-form methods.
    """

    settings_type = EMMETSettings
    settings: EMMETSettings
    published = "EMMET"

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layer: int | None = None,
        eps: float = 1e-3,
        legacy_absolute_eps: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, **settings)

    def solution(self, module: str, equation: Equation, prior: Prior) -> LowRankDelta:
        """The change that meets all residuals, or nearly."""
        eps, relative = self.settings.eps, not self.settings.legacy_absolute_eps
        return ridge_update(equation.keys.T, equation.residuals.T, prior, eps, relative)
