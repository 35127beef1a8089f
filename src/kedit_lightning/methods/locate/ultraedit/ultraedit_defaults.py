"""Projections and learning rates of UltraEdit: published settings, and the rule for other models.

Published values are those of the configuration files of UltraEdit's repository.
"""

from __future__ import annotations

from collections.abc import Iterable

from kedit_lightning.base_models import BaseModel

#: Projections, as their number among those of an MLP in the order they run (gate, up, ..., down is
#: -1), and the blocks whose projection is edited; by model type, number of blocks and hidden size.
#: Llama 2 has the shape of Llama 3, and so its settings.
PUBLISHED: dict[tuple[str, int, int], tuple[tuple[int, range], ...]] = {
    ("gptj", 28, 4096): ((-1, range(18, 27)),),
    ("llama", 32, 4096): ((0, range(11, 16)), (1, range(18, 25))),
    ("mistral", 32, 4096): ((-1, range(29, 31)),),
    ("phi3", 40, 5120): ((-1, range(30, 39)),),
    ("qwen2", 28, 3584): ((0, range(18, 27)), (1, range(18, 27))),
}
#: What the paper sets for all its models, of seven thousand million weights and more.
USUAL_LR = 1e-6
#: Small models need far more, since a move grows with the width of the projections: ``nano``'s was
#: chosen on its validation split, for some 60 facts at once.
LR: dict[tuple[str, int, int], float] = {("llama", 6, 256): 2e-3}


def last_third(blocks: int) -> range:
    """The blocks that are edited in a model without published settings.

    >>> last_third(32), last_third(6), last_third(1)
    (range(21, 32), range(4, 6), range(0, 1))
    """
    return range(blocks - max(1, round(blocks / 3)), blocks)


def default_modules(base: BaseModel, layers: Iterable[int] | None) -> tuple[str, ...]:
    """Names of the projections that are edited: all of the given layers, where there are any."""
    layout = base.layout
    published = PUBLISHED.get(_key(base))
    if layers is None and published is not None:
        return tuple(layout.block(i).projections[which] for which, at in published for i in at)
    chosen = last_third(len(layout)) if layers is None else layers
    return tuple(name for i in chosen for name in layout.block(i).projections)


def default_lr(base: BaseModel) -> float:
    """The learning rate."""
    return LR.get(_key(base), USUAL_LR)


def _key(base: BaseModel) -> tuple[str, int, int]:
    return base.model.config.model_type, len(base.layout), base.layout.hidden_size
