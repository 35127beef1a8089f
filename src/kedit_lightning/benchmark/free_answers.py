"""Answers to plain prompts, without and with the edits that are applied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.image_reference import Image


def free_answers(
    base: BaseModel,
    prompts: Sequence[str],
    protocol: Protocol,
    images: Sequence[Image | None] | None = None,
) -> list[dict[str, str]]:
    """For each ``prompt`` its answer without (``base``) and with the applied edits (``edited``)."""
    settings = protocol.max_new_tokens, protocol.score_batch_size
    generate = partial(
        base.generate, prompts, *settings, True, images=images, generation=protocol.generation
    )
    with base.edits.suspended():
        unedited = generate()
    edited = generate() if base.edits.active else unedited
    texts = zip(prompts, unedited, edited, strict=True)
    return [{"prompt": p, "base": before, "edited": after} for p, before, after in texts]
