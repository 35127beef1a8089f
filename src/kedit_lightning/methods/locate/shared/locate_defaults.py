"""Where closed-form methods edit and how they optimise values: defaults, and rules by depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits.projections import projection_shape

#: Keys of a text count this many times the width of the MLP against a fact: published weights are
#: 0.9 (GPT-J), 1.4 (Llama) and 3.1 (GPT-2 XL) times it.  In units of the width, the weight does not
#: depend on the scale of the keys: the mean of ``kᵀ C⁻¹ k`` over a text is the width.
WIDTHS = 1.5


@dataclass(frozen=True)
class LocateSettings:
    """Where a method edits, and how it optimises values.

    Args:
        layers: Blocks whose MLPs are edited.
        preserve: How many keys of plain text count against one of a fact, ``λ``.
        steps: Passes of the target optimisation; the last one only measures.
        lr: Learning rate of Adam.
        clamp: Largest ``‖δ‖ / ‖z‖``.
        weight_decay: Weight of ``‖δ‖ / ‖z‖²``.
        kl_factor: Weight of the divergence from the unedited answer to "{subject} is a".
        stop_loss: A request is finished once its loss is below this.
        patience: A request is finished this many steps after its answer has become the likeliest
            under every context (MPES of ENCORE); ``None`` for never.
        relaxed: Weigh the loss of an answer that is the likeliest down until the divergence is
            small (PMET).
        consistency: Weight of the distance of contexts in later blocks (CORE).
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
    """At 17 % of the depth for gated MLPs and 35 % for plain ones, where published layers lie."""
    return _dense(base, (round((0.17 if base.layout.is_gated else 0.35) * len(base.layout)),))


def _dense(base: BaseModel, layers: Sequence[int]) -> tuple[int, ...]:
    """The nearest blocks with a dense MLP; in most models these are the blocks themselves."""
    dense = base.layout.dense_layers
    return tuple(sorted({min(dense, key=lambda known: abs(known - i)) for i in layers}))


def several_layers(base: BaseModel) -> tuple[int, ...]:
    """At most five: up to a quarter of the depth for gated MLPs, to 36 % for plain ones."""
    depth = len(base.layout)
    start, end = (1 / 8, 1 / 4) if base.layout.is_gated else (0.27, 0.36)
    last = round(end * depth)
    return _dense(base, range(max(round(start * depth), last - 4), last + 1))


def default_weight(base: BaseModel, layer: int) -> float:
    """Weight ``λ`` of keys of plain text for a layer whose model is not in the tables."""
    return WIDTHS * projection_shape(base.module(base.layout.block(layer).down))[0]
