"""Published layers of GRACE's codebook, and the rule for all other models."""

from __future__ import annotations

from kedit_lightning.base_models import BaseModel

#: Depth, as a share of the blocks, of the codebook in models without published settings.
USUAL_DEPTH = 0.75
#: Block, and which of its MLP projections, by model type, number of blocks and hidden size: GPT-2
#: XL as in the GRACE paper's code, the others as in EasyEdit.
PUBLISHED: dict[tuple[str, int, int], tuple[int, int]] = {
    ("gpt2", 48, 1600): (35, 0),
    ("gptj", 28, 4096): (25, -1),
    ("llama", 32, 4096): (27, -1),
    ("llama", 28, 3072): (27, -1),
    ("qwen2", 28, 3584): (18, -1),
}


def default_place(base: BaseModel) -> tuple[int, int]:
    """The block with the codebook, and the index of the projection among those of its MLP."""
    layout = base.layout
    key = (base.model.config.model_type, len(layout), layout.hidden_size)
    # At least one block must follow, or the later answer tokens could not attend to the value.
    layer = max(0, min(round(USUAL_DEPTH * len(layout)), len(layout) - 2))
    return PUBLISHED.get(key, (layer, -1))
