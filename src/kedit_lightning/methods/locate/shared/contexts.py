"""Context prefixes: texts put before a prompt, so that an edit does not depend on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kedit_lightning.base_models import BaseModel

#: Words that start the texts.
STARTERS = ("The", "Therefore", "Because", "I", "You")


def sample_contexts(
    base: BaseModel, count: int, seed: int, lengths: Sequence[int]
) -> tuple[str, ...]:
    """Context prefixes that the unedited base model writes, by top-k sampling with k = 5 (ROME).

    Each of the lengths, in tokens, makes an equal part of the texts, which end in a full stop and a
    space.  The same model, count, seed and lengths give the same texts.
    """
    texts: list[str] = []
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), base.edits.suspended():
        torch.manual_seed(seed)
        for number, length in enumerate(lengths, start=1):
            wanted = count * number // len(lengths) - count * (number - 1) // len(lengths)
            starters = [STARTERS[i % len(STARTERS)] for i in range(wanted)]
            if starters:
                continued = base.generate(starters, length, do_sample=True, top_k=5)
                texts += [a + b for a, b in zip(starters, continued, strict=True)]
    return tuple(" ".join(text.split()).rstrip(" .") + ". " for text in texts)
