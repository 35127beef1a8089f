"""Texts put before a prompt, so that an edit does not depend on what stands there."""

from __future__ import annotations

import torch

from kedit_lightning.base_models import BaseModel

#: Words that start the texts.
STARTERS = ("The", "Therefore", "Because", "I", "You")
#: Lengths of the texts in tokens; half of them are short.
LENGTHS = (5, 10)


def sample_contexts(base: BaseModel, count: int, seed: int) -> tuple[str, ...]:
    """Short texts that the unedited base model writes, each ready to stand before a prompt.

    Half of them have 5 tokens and half 10, sampled from the 5 likeliest next tokens, as in the code
    of the ROME paper.  The same model, count and seed give the same texts.

    Returns:
        ``count`` texts that end in a full stop and a space.
    """
    texts: list[str] = []
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), base.edits.suspended():
        torch.manual_seed(seed)
        for length in LENGTHS:
            wanted = count // 2 if length == LENGTHS[0] else count - count // 2
            starters = [STARTERS[i % len(STARTERS)] for i in range(wanted)]
            if not starters:
                continue
            continued = base.generate(starters, length, do_sample=True, top_k=5)
            texts += [_clean(a + b) for a, b in zip(starters, continued, strict=True)]
    return tuple(texts)


def _clean(text: str) -> str:
    return " ".join(text.split()).rstrip(" .") + ". "
