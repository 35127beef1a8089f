"""Published settings of constrained fine-tuning, and the rule for all other models.

Values come from the configuration files of EasyEdit, and from the ROME repository for the smaller
GPT-2 models, which EasyEdit does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

from kedit_lightning.base_models import BaseModel

#: Depth as a share of the blocks in most of EasyEdit's configurations (block 21 of 32).
USUAL_DEPTH = 0.66


@dataclass(frozen=True)
class PublishedSettings:
    """Published settings of one model.

    Args:
        layers: Blocks whose down projection is trained.
        steps: Epochs over the requests.
        norm_constraint: Largest change of any entry; infinite where there is no limit.
    """

    layers: tuple[int, ...]
    steps: int = 25
    norm_constraint: float = float("inf")


#: By model type, number of blocks and hidden size, which identify a model under any name or path.
PUBLISHED: dict[tuple[str, int, int], PublishedSettings] = {
    ("gpt2", 24, 1024): PublishedSettings((0,), norm_constraint=2e-3),
    ("gpt2", 36, 1280): PublishedSettings((0,), norm_constraint=1e-3),
    ("gpt2", 48, 1600): PublishedSettings((0,), norm_constraint=5e-4),
    ("gptj", 28, 4096): PublishedSettings((21,)),
    ("llama", 32, 4096): PublishedSettings((21,)),
    ("llama", 28, 3072): PublishedSettings((21,)),
    ("mistral", 32, 4096): PublishedSettings((21,), norm_constraint=5e-5),
    ("qwen", 32, 4096): PublishedSettings((31,), norm_constraint=5e-5),
    ("qwen2", 28, 3584): PublishedSettings((27,)),
    ("chatglm", 28, 4096): PublishedSettings((27,), steps=40),
    ("internlm", 32, 4096): PublishedSettings((0, 31), steps=40),
}


def published_settings(base: BaseModel) -> PublishedSettings:
    """Published settings of a known model, else defaults for its number of blocks."""
    layout = base.layout
    key = (base.model.config.model_type, len(layout), layout.hidden_size)
    layer = min(round(USUAL_DEPTH * len(layout)), len(layout) - 1)
    return PUBLISHED.get(key) or PublishedSettings((layer,))
