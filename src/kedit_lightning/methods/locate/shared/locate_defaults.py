"""Published settings of the closed-form methods by model, and rules for all other models.

Sources: Meng et al. 2022 and 2023, Li et al. 2024, Fang et al. 2025 and their code, and the
settings files of EasyEdit for the models those did not edit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits.projections import projection_shape

#: Model type, number of blocks and width.
ModelKey: TypeAlias = tuple[str, int, int]

GPT2_MEDIUM: ModelKey = ("gpt2", 24, 1024)
GPT2_LARGE: ModelKey = ("gpt2", 36, 1280)
GPT2_XL: ModelKey = ("gpt2", 48, 1600)
GPT_J: ModelKey = ("gptj", 28, 4096)
GPT_NEOX_20B: ModelKey = ("gpt_neox", 44, 6144)
LLAMA_7B: ModelKey = ("llama", 32, 4096)
LLAMA_3B: ModelKey = ("llama", 28, 3072)
#: The packaged model; its settings were chosen on the validation split of NanoFacts.
NANO: ModelKey = ("llama", 6, 256)
MISTRAL_7B: ModelKey = ("mistral", 32, 4096)
QWEN2_7B: ModelKey = ("qwen2", 28, 3584)

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

    layers: tuple[int, ...] = ()
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


def _span(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


_ROME = LocateSettings(clamp=4.0, weight_decay=1e-3)
_EASYEDIT = LocateSettings(_span(4, 8), 15_000, clamp=4.0, weight_decay=1e-3)

#: Settings of ROME and RROME, by model.
ROME_PUBLISHED: Mapping[ModelKey, LocateSettings] = MappingProxyType(
    {
        GPT2_MEDIUM: replace(_ROME, layers=(8,), steps=20, weight_decay=0.5, clamp=3.0),
        GPT2_LARGE: replace(_ROME, layers=(12,), steps=20, weight_decay=0.5),
        GPT2_XL: replace(_ROME, layers=(17,), steps=20, weight_decay=0.5),
        GPT_J: replace(_ROME, layers=(5,), steps=20, weight_decay=0.5),
        GPT_NEOX_20B: replace(_ROME, layers=(15,), steps=20, weight_decay=0.5),
        **{key: replace(_ROME, layers=(5,)) for key in (LLAMA_7B, LLAMA_3B, MISTRAL_7B, QWEN2_7B)},
    }
)
#: Settings of MEMIT, by model.
MEMIT_PUBLISHED: Mapping[ModelKey, LocateSettings] = MappingProxyType(
    {
        NANO: LocateSettings((0, 1), 50),
        GPT2_XL: LocateSettings(_span(13, 17), 20_000, steps=20),
        GPT_J: LocateSettings(_span(3, 8), 15_000),
        GPT_NEOX_20B: LocateSettings(_span(6, 10), 6_000, steps=20, clamp=0.8),
        LLAMA_7B: _EASYEDIT,
        LLAMA_3B: _EASYEDIT,
        MISTRAL_7B: _EASYEDIT,
        QWEN2_7B: _EASYEDIT,
    }
)
#: Settings of AlphaEdit, by model: those of its paper for Llama 3, which has the shape of Llama 2.
ALPHAEDIT_PUBLISHED: Mapping[ModelKey, LocateSettings] = MappingProxyType(
    {**MEMIT_PUBLISHED, LLAMA_7B: LocateSettings(_span(4, 8), lr=0.1)}
)
#: Settings of PMET, by model.
PMET_PUBLISHED: Mapping[ModelKey, LocateSettings] = MappingProxyType(
    {
        NANO: LocateSettings((0, 1), 1, clamp=4.0, weight_decay=0.1),
        GPT2_XL: LocateSettings(_span(13, 17), 20_000, clamp=1.0),
        GPT_J: LocateSettings(_span(3, 8), 6_000, steps=30, lr=0.2, kl_factor=1.0),
        GPT_NEOX_20B: LocateSettings(_span(6, 10), 15_000, steps=30, clamp=0.8, kl_factor=0.8),
        LLAMA_7B: LocateSettings(_span(4, 8), 15_000, steps=20, clamp=1.0),
        LLAMA_3B: LocateSettings(_span(4, 8), 15_000, clamp=1.0),
    }
)
#: Settings of EMMET, by model.
EMMET_PUBLISHED: Mapping[ModelKey, LocateSettings] = MappingProxyType(
    {
        GPT2_XL: LocateSettings((17,), 10_000, steps=20),
        GPT_J: LocateSettings((5,), 100_000),
        LLAMA_7B: LocateSettings((5,), 100_000),
    }
)


def model_key(base: BaseModel) -> ModelKey:
    """Key of a model in the tables of published settings."""
    return base.model.config.model_type, len(base.layout), base.layout.hidden_size


def one_layer(base: BaseModel) -> tuple[int, ...]:
    """At 17 % of the depth for gated MLPs and 35 % for plain ones, where published layers lie."""
    return _dense(base, (round((0.17 if base.layout.is_gated else 0.35) * len(base.layout)),))


def _dense(base: BaseModel, layers: tuple[int, ...]) -> tuple[int, ...]:
    """The nearest blocks with a dense MLP; in most models these are the blocks themselves."""
    dense = base.layout.dense_layers
    return tuple(sorted({min(dense, key=lambda known: abs(known - i)) for i in layers}))


def several_layers(base: BaseModel) -> tuple[int, ...]:
    """At most five: up to a quarter of the depth for gated MLPs, to 36 % for plain ones."""
    depth = len(base.layout)
    start, end = (1 / 8, 1 / 4) if base.layout.is_gated else (0.27, 0.36)
    last = round(end * depth)
    return _dense(base, _span(max(round(start * depth), last - 4), last))


def default_weight(base: BaseModel, layer: int) -> float:
    """Weight ``λ`` of keys of plain text for a layer whose model is not in the tables."""
    return WIDTHS * projection_shape(base.module(base.layout.block(layer).down))[0]
