"""Context prefixes: texts put before a prompt, so that an edit does not depend on them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from kedit_lightning.base_models import BaseModel
from kedit_lightning.chat_turns import put_before
from kedit_lightning.image_reference import references
from kedit_lightning.requests import EditRequest

#: Words that start the texts.
STARTERS = ("The", "Therefore", "Because", "I", "You")
#: Tokens of a row beside those of its texts: special ones, and what a chat template adds.
_AROUND = 64


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


def contexts_of(base: BaseModel, request: EditRequest, contexts: Sequence[str]) -> list[str]:
    """The contexts of one request, whose number is that of all; the first is none.

    In place of a context that leaves no room for the prompt and its answer stands none too.
    """
    text = request.prompt + request.target_new
    longest = max((len(context.encode()) for context in contexts), default=0)
    if not contexts or (
        request.image is None and len(text.encode()) + longest + _AROUND <= base.max_tokens
    ):
        return ["", *contexts]  # a token has at least one byte
    chosen = [""]
    for context in contexts:
        prompt = put_before(context, request.prompt)
        row = base.encoder.encode(prompt, request.target_new, None, references(request.image))
        fits = len(row.prompt) + len(row.answer) <= base.max_tokens
        chosen.append(context if fits else "")
    if "" in chosen[1:]:
        warnings.warn(
            f"texts put before prompts are left out where they do not fit into the "
            f"{base.max_tokens} tokens of base model '{base.name}'",
            stacklevel=2,
        )
    return chosen
