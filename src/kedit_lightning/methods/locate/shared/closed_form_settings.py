"""Settings of the closed-form methods, and rules for models without published ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, TypeAlias

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.layer_choice import nearest_attending_layers, nearest_layers
from kedit_lightning.edits.projections import projection_shape
from kedit_lightning.methods.capabilities import (
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    PositiveShare,
    Share,
)
from kedit_lightning.methods.locate.shared.alignment import ALIGNED_CLAMP
from kedit_lightning.methods.locate.shared.covariance_factors import check_mode
from kedit_lightning.methods.method import MethodSettings

#: Where values are optimised: at the ``last`` layer, for all layers (MEMIT); at each layer its
#: ``own`` (BLUE); or at the first, with those of later layers taken ``forward`` from it (FE).
Targets: TypeAlias = Literal["last", "own", "forward"]
#: What ``ridge`` counts against where no weight of keys is published, in widths of the MLP;
#: published weights are 0.9 (GPT-J), 1.4 (Llama) and 3.1 (GPT-2 XL) times it.
WIDTHS = 1.5
#: Rules for models in no table; benchmarks/RESULTS.md has what they were chosen by.
#: Keys of plain text count this much against one of a typical fact: a lone fact misses 6 % of its
#: value.  A fixed number of keys, as published, depends on how rare the keys of subjects are.
TEXT_SHARE = 0.06
#: A value moves by at most this many norms of the hidden state, whose scale the later blocks read.
HIDDEN_CLAMP = 1.0
#: Facts that are found earlier stop earlier.
STEPS = 50
#: The decay, over the squared norm of a value, would hold small hidden states back.
WEIGHT_DECAY = 1e-3
#: Models with fewer blocks gather what they know of a subject in the first of them.
SHALLOW = 12


@dataclass(frozen=True)
class LocateSettings:
    """Where a method edits, and how it optimises values; ``ClosedForm`` describes the settings.

    ``clamp`` bounds ``‖δ‖ / ‖z‖`` and ``weight_decay`` is the weight of ``‖δ‖ / ‖z‖²``; ``relaxed``
    weighs the loss of an answer that is the likeliest down until the divergence is small (PMET).
    """

    layers: Sequence[int] = ()
    preserve: float | None = None
    steps: int = 25
    lr: float = 0.5
    clamp: float = 0.75
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    stop_loss: float = 0.05
    patience: int | None = None
    relaxed: bool = False
    consistency: float = 0.0


def one_layer(base: BaseModel) -> tuple[int, ...]:
    """At 17 % of the depth for gated MLPs and 35 % for plain ones, where published layers lie.

    In a shallow model it is the first.
    """
    depth, dense = len(base.layout), base.layout.mlp_layers
    if depth < SHALLOW:
        return nearest_layers(dense, (0,))
    return nearest_layers(dense, (round((0.17 if base.layout.is_gated else 0.35) * depth),))


def several_layers(base: BaseModel) -> tuple[int, ...]:
    """At most five: up to a quarter of the depth for gated MLPs, to 36 % for plain ones.

    In a shallow model it is the first eighth.
    """
    return nearest_layers(base.layout.mlp_layers, _usual_range(base))


def _usual_range(base: BaseModel) -> range:
    depth = len(base.layout)
    if depth < SHALLOW:
        return range(depth // 8 + 1)
    start, end = (1 / 8, 1 / 4) if base.layout.is_gated else (0.27, 0.36)
    last = round(end * depth)
    return range(max(round(start * depth), last - 4), last + 1)


def layers_beside_attention(base: BaseModel) -> tuple[int, ...]:
    """Those of several layers, and the first quarter of a shallow model.

    What is optimised at attention but not written must be made up for by more layers.
    """
    depth = len(base.layout)
    wished = range(depth // 4 + 1) if depth < SHALLOW else _usual_range(base)
    return nearest_attending_layers(base.layout, wished)


@dataclass(frozen=True)
class ClosedFormSettings(MethodSettings):
    """Settings of all closed-form methods; :class:`ClosedForm` describes them."""

    steps: Count | None
    lr: Positive | None
    weight_decay: NotNegative | None
    clamp: Positive | None
    kl_factor: NotNegative | None
    stop_loss: NotNegative
    preserve: NotNegative | None
    history: bool | None
    ridge: NotNegative
    targets: Targets
    patience: CountOrZero | None
    consistency: NotNegative
    aligned: bool
    norm_anchor: bool
    keep_share: PositiveShare | None
    restrain: bool
    off_main: Share
    contexts: CountOrZero
    statistics: str
    fit_length: Count
    fit_tokens: Count | None
    fit_error: Positive | None
    #: Whether keys of plain text count in the cost of a change, by ``preserve``.
    weighs_text: ClassVar[bool] = True

    @property
    def apart(self) -> bool:
        """Whether values depend on those found with them, or changes are dense, so that few fit."""
        return self.aligned or self.norm_anchor or self.keep_share is not None

    def reported(self) -> dict[str, Any]:
        """Their values; where ``preserve`` follows from the keys of each edit, the rule."""
        values = super().reported()
        if self.preserve is None and self.weighs_text:
            values["preserve"] = f"{TEXT_SHARE:.0%} of a typical key of each edit, which notes it"
        return values

    def check_bounds(self, method: str) -> None:
        """Check numbers, and where statistics come from; see the base class."""
        super().check_bounds(method)
        check_mode(self.statistics)

    def over(self, usual: LocateSettings) -> LocateSettings:
        """Settings that depend on the model, with those that the user chose in their place."""
        if self.aligned:
            usual = replace(usual, clamp=ALIGNED_CLAMP)
        names = vars(usual).keys() - {"layers"}
        chosen = {name: value for name, value in vars(self).items() if name in names}
        return replace(usual, **{n: value for n, value in chosen.items() if value is not None})

    def resolved(self, used: LocateSettings, history: bool) -> Self:
        """The settings with the values that are used in place of those left open."""
        layers = list(used.layers)
        values = {**vars(used), "history": history, "layers": layers, "layer": layers[0]}
        return replace(self, **{name: v for name, v in values.items() if name in vars(self)})


@dataclass(frozen=True)
class LayerSettings(ClosedFormSettings):
    """Settings of methods that edit one layer."""

    layer: int | None
    #: Layers of a model without published settings.
    default_layers = staticmethod(one_layer)

    @property
    def chosen_layers(self) -> tuple[int, ...]:
        """The layer that the user chose, if any."""
        return () if self.layer is None else (self.layer,)


@dataclass(frozen=True)
class LayersSettings(ClosedFormSettings):
    """Settings of methods that edit several layers."""

    layers: list[int] | None
    #: Layers of a model without published settings.
    default_layers = staticmethod(several_layers)

    @property
    def chosen_layers(self) -> tuple[int, ...]:
        """The layers that the user chose, if any."""
        return tuple(self.layers or ())


#: Settings of methods that edit one layer, or several.
LocatedSettings: TypeAlias = LayerSettings | LayersSettings


def default_weight(base: BaseModel, layer: int) -> float:
    """Weight ``λ`` of keys of plain text that a ``ridge`` is compared with."""
    return WIDTHS * projection_shape(base.module(base.layout.mlp_block(layer).down))[0]
