"""Free generation."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kedit_lightning.base_models.base_model import BaseModel
    from kedit_lightning.base_models.rows.encoding import TokenRows

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
    # Torchmetrics comes with it, which plain generation does without.
    from kedit_lightning.metrics.functional.text_match import answer_text

    return answer_text(text) != text.rstrip()


@torch.no_grad()
def generate_texts(
    base: BaseModel,
    rows: TokenRows,
    max_new_tokens: int,
    stop_at_sentence: bool,
    options: dict[str, Any],
) -> list[str]:
    """Continue left-padded rows; see :meth:`BaseModel.generate`."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    prompt = 1 if base.is_encoder_decoder else rows.inputs["input_ids"].shape[1]
    pad = base.tokenizer.pad_token_id
    pad = base.tokenizer.eos_token_id if pad is None else pad

    def decode(ids: Tensor) -> str:
        text: str = base.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def ended(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = [sentence_ended(decode(row[prompt:])) for row in ids]
        return torch.tensor(done, device=ids.device)

    settings: dict[str, Any] = {
        "do_sample": False,
        "pad_token_id": 0 if pad is None else pad,
        "max_new_tokens": max_new_tokens,
        **options,
    }
    criteria = [*settings.pop("stopping_criteria", []), *([ended] if stop_at_sentence else [])]
    processors = settings.pop("logits_processor", [])
    if not base.is_encoder_decoder:
        room = base.max_tokens - prompt
        settings["max_new_tokens"] = max(1, min(settings["max_new_tokens"], room))
    # Said here, since without a key-value cache every step looks like the first one.
    with base.edits.prompts_end_at(rows.prompt_end):
        ids: Tensor = base.model.generate(
            **{name: rows.inputs[name] for name in ("input_ids", "attention_mask")},
            stopping_criteria=StoppingCriteriaList(criteria),
            logits_processor=LogitsProcessorList(processors),
            **settings,
        )
    if not stop_at_sentence:
        return [decode(row[prompt:]) for row in ids]
    return [_until_ended(row[prompt:], decode) for row in ids]


def _until_ended(ids: Tensor, decode: Callable[[Tensor], str]) -> str:
    """Text up to the token that ends the sentence.

    A model without an end-of-text token writes on until all rows of the batch have ended.
    """
    lengths = range(len(ids) + 1)
    end = bisect_left(lengths, True, key=lambda n: sentence_ended(decode(ids[:n])))
    return decode(ids[:end])
