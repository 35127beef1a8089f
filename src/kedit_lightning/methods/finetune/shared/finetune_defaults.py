"""Defaults of constrained fine-tuning: published settings, and the rule for other models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kedit_lightning.base_models import BaseModel
from kedit_lightning.methods.shared.published_settings import published_settings

#: Depth as a share of the blocks in most of EasyEdit's configurations (block 21 of 32).
USUAL_DEPTH = 0.66


@dataclass(frozen=True)
class FinetuneDefaults:
    """Defaults for one model.

    Args:
        layers: Blocks whose down projection is trained.
        steps: Epochs over the requests.
        norm_constraint: Largest change of any entry; infinite where there is no limit.
    """

    layers: Sequence[int]
    steps: int = 25
    norm_constraint: float = float("inf")


def finetune_defaults(base: BaseModel) -> FinetuneDefaults:
    """Published settings of a known model, else defaults for its number of blocks."""
    blocks = len(base.layout)
    usual = FinetuneDefaults((min(round(USUAL_DEPTH * blocks), blocks - 1),))
    return published_settings(base, "FTM", FinetuneDefaults) or usual
