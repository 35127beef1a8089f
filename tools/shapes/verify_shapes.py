"""What ``shapes`` knows: ``python tools/shapes/verify_shapes.py [FOLDER]``."""

from __future__ import annotations

import random
import sys
from collections import defaultdict

import torch
from sequences import forms
from train_shapes import split

from kedit_lightning import BaseModel
from kedit_lightning.data.multimodal.drawing import Drawing
from kedit_lightning.image_reference import settled

DRAWINGS = 160


@torch.no_grad()
def right_answers(base: BaseModel, pool: list[dict[str, str]]) -> dict[str, float]:
    """Share of answers whose tokens are all arg-max, by attribute."""
    draws, right = random.Random(99), defaultdict[str, list[bool]](list)
    for _ in range(DRAWINGS):
        content = draws.choice(pool)
        picture = settled(Drawing(draws.randrange(1 << 30), **content).image())
        prompts = [forms(attribute)[0] for attribute in content]
        rows = base.rows(prompts, list(content.values()), images=[picture] * len(prompts))
        hits = (base.answer_logits(rows).argmax(-1) == rows.answer_ids) | ~rows.answer_mask
        for attribute, hit in zip(content, hits.all(1).tolist(), strict=True):
            right[attribute].append(hit)
    shares = {attribute: sum(hits) / len(hits) for attribute, hits in right.items()}
    return {**shares, "all": sum(shares.values()) / len(shares)}


def main() -> None:
    """Print both shares."""
    base = BaseModel.load(sys.argv[1] if len(sys.argv) > 1 else "shapes")
    for name, pool in zip(("learned", "kept apart"), split(), strict=True):
        print(name, {key: round(share, 3) for key, share in right_answers(base, pool).items()})


if __name__ == "__main__":
    main()
