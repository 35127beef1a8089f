"""Published settings of known models, and rules for all others."""

from __future__ import annotations

from dataclasses import dataclass

from kedit_lightning.base_models import BaseModel


@dataclass(frozen=True)
class RomeSettings:
    """Settings of ROME that depend on the model.

    Args:
        layer: Block whose MLP is edited.
        steps: Passes of the target optimisation; the last one only measures.
        weight_decay: Weight of ``‖δ‖ / ‖z‖²`` in the loss.
        clamp: Largest ``‖δ‖ / ‖z‖``.
    """

    layer: int
    steps: int = 25
    weight_decay: float = 1e-3
    clamp: float = 4.0


#: By model type, number of blocks and width: Meng et al. 2022 (GPT family), the settings files of
#: EasyEdit for the others.
PUBLISHED: dict[tuple[str, int, int], RomeSettings] = {
    ("gpt2", 24, 1024): RomeSettings(8, 20, 0.5, 3.0),
    ("gpt2", 36, 1280): RomeSettings(12, 20, 0.5),
    ("gpt2", 48, 1600): RomeSettings(17, 20, 0.5),
    ("gptj", 28, 4096): RomeSettings(5, 20, 0.5),
    ("gpt_neox", 44, 6144): RomeSettings(15, 20, 0.5),
    ("llama", 32, 4096): RomeSettings(5),
    ("llama", 28, 3072): RomeSettings(5),
    ("mistral", 32, 4096): RomeSettings(5),
    ("qwen2", 28, 3584): RomeSettings(5),
}


def rome_settings(base: BaseModel) -> RomeSettings:
    """Published settings where there are some, else settings derived from the model's structure.

    The layer is at 17 % of the depth for gated MLPs and at 35 % for plain ones, which is where the
    published layers lie.
    """
    depth, width = len(base.layout), base.layout.hidden_size
    known = PUBLISHED.get((base.model.config.model_type, depth, width))
    if known is not None:
        return known
    return RomeSettings(layer=round((0.17 if base.layout.is_gated else 0.35) * depth))
