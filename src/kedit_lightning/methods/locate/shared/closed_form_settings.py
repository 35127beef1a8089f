"""Settings of the closed-form methods."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias

from kedit_lightning.methods.locate.shared.alignment import ALIGNED_CLAMP
from kedit_lightning.methods.locate.shared.covariance_factors import StatisticsMode
from kedit_lightning.methods.locate.shared.locate_defaults import LocateSettings
from kedit_lightning.methods.method import MethodSettings

#: Where values are optimised: at the ``last`` layer, for all layers (MEMIT); at each layer its
#: ``own`` (BLUE); or at the first, with those of later layers taken ``forward`` from it (FE).
Targets: TypeAlias = Literal["last", "own", "forward"]


@dataclass(frozen=True)
class ClosedFormSettings(MethodSettings):
    """Settings of all closed-form methods; :class:`ClosedForm` describes them."""

    steps: int | None
    lr: float | None
    weight_decay: float | None
    clamp: float | None
    kl_factor: float | None
    stop_loss: float
    preserve: float | None
    history: bool | None
    ridge: float
    targets: Targets
    patience: int | None
    consistency: float
    aligned: bool
    norm_anchor: bool
    keep_share: float | None
    restrain: bool
    off_main: float
    contexts: int
    statistics: StatisticsMode
    fit_length: int
    fit_tokens: int | None
    fit_error: float | None

    def over(self, usual: LocateSettings) -> LocateSettings:
        """Settings that depend on the model, with those that the user chose in their place."""
        if self.aligned:
            usual = replace(usual, clamp=ALIGNED_CLAMP)
        names = vars(usual).keys() - {"layers"}
        chosen = {name: value for name, value in vars(self).items() if name in names}
        return replace(usual, **{n: value for n, value in chosen.items() if value is not None})

    def resolved(self, used: LocateSettings, **others: Any) -> Self:
        """The settings with the values that are used in place of those left open."""
        values = {name: value for name, value in vars(used).items() if name in vars(self)}
        return replace(self, **{**values, **others})


@dataclass(frozen=True)
class LayerSettings(ClosedFormSettings):
    """Settings of methods that edit one layer."""

    layer: int | None

    @property
    def chosen_layers(self) -> tuple[int, ...]:
        """The layer that the user chose, if any."""
        return () if self.layer is None else (self.layer,)

    def at_layers(self, layers: tuple[int, ...]) -> Self:
        """The same settings at the layer that is edited."""
        return replace(self, layer=layers[0])


@dataclass(frozen=True)
class LayersSettings(ClosedFormSettings):
    """Settings of methods that edit several layers."""

    layers: list[int] | None

    @property
    def chosen_layers(self) -> tuple[int, ...]:
        """The layers that the user chose, if any."""
        return tuple(self.layers or ())

    def at_layers(self, layers: tuple[int, ...]) -> Self:
        """The same settings at the layers that are edited."""
        return replace(self, layers=list(layers))


#: Settings of the two kinds of methods, with :attr:`chosen_layers` and :meth:`at_layers`.
LocatedSettings: TypeAlias = LayerSettings | LayersSettings
