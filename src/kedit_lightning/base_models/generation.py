"""Free generation: continuations of prompts."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from kedit_lightning.base_models.rows import TokenRows
from kedit_lightning.sentence import answer_text

#: Inputs that ``generate`` makes itself.
_MADE = ("position_ids", "decoder_input_ids", "decoder_attention_mask")
#: Where a sentence may have ended: more must follow, or it could still turn out an abbreviation.
_STOPPED = re.compile(r"[.!?][\"')\]\u201d\u2019]*\s+\S|[\u3002\uff01\uff1f]")


def sentence_ended(text: str) -> bool:
    """Whether a continuation has ended its first line or sentence.

    >>> sentence_ended(" Rome. It"), sentence_ended(" St. Louis"), sentence_ended(" Rome")
    (True, False, False)
    """
    text = text.lstrip()
    if "\n" in text or not _STOPPED.search(text):
        return "\n" in text
    return answer_text(text) != text.rstrip()


@torch.no_grad()
def generate_texts(
    model: Any, tokenizer: Any, rows: TokenRows, stop_at_sentence: bool, options: dict[str, Any]
) -> list[str]:
    """Continue left-padded rows; see :meth:`BaseModel.generate`."""
    prompt = 1 if "decoder_input_ids" in rows.inputs else rows.inputs["input_ids"].shape[1]

    def decode(ids: Tensor) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def ended(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = [sentence_ended(decode(row[prompt:])) for row in ids]
        return torch.tensor(done, device=ids.device)

    settings = {"do_sample": False, **options}
    criteria = [*settings.pop("stopping_criteria", []), *([ended] if stop_at_sentence else [])]
    ids: Tensor = model.generate(
        **{name: value for name, value in rows.inputs.items() if name not in _MADE},
        stopping_criteria=StoppingCriteriaList(criteria),
        logits_processor=LogitsProcessorList(settings.pop("logits_processor", [])),
        **settings,
    )
    if not stop_at_sentence:
        return [decode(row[prompt:]) for row in ids]
    return [_until_ended(row[prompt:], decode) for row in ids]


def _until_ended(ids: Tensor, decode: Callable[[Tensor], str]) -> str:
    """Text up to the token that ends the sentence; other rows of the batch may go on longer."""
    lengths = range(len(ids) + 1)
    end = bisect_left(lengths, True, key=lambda n: sentence_ended(decode(ids[:n])))
    return decode(ids[:end])
