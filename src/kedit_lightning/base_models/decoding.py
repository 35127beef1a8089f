"""Free generation."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kedit_lightning.base_models.base_model import BaseModel
    from kedit_lightning.base_models.rows import TokenRows

#: A line or a sentence that has ended: something must follow, so that "St." is not taken for one.
_ENDED = re.compile(r"\n|[.!?][\"')\]]?\s")


def sentence_ended(text: str) -> bool:
    """Whether a continuation has ended its first line or sentence.

    >>> sentence_ended(" Rome. It"), sentence_ended(" St")
    (True, False)
    """
    return _ENDED.search(text.lstrip()) is not None


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

    def decode(ids: Tensor) -> list[str]:
        texts: list[str] = base.tokenizer.batch_decode(ids[:, prompt:], skip_special_tokens=True)
        return texts

    def all_ended(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended = [sentence_ended(text) for text in decode(ids)]
        return torch.tensor(ended, device=ids.device)

    def adjust(ids: Tensor, scores: Tensor) -> Tensor:
        return base.edits.adjust_logits(scores)

    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens, **options}
    inputs = {n: rows.inputs[n] for n in ("input_ids", "attention_mask")}
    if not base.is_encoder_decoder:
        room = base.max_tokens - prompt
        settings["max_new_tokens"] = max(1, min(settings["max_new_tokens"], room))
    # Said here, since without a key-value cache every step looks like the first one.
    with base.edits.prompts_end_at(rows.prompt_end):
        ids = base.model.generate(
            **inputs,
            pad_token_id=0 if pad is None else pad,
            stopping_criteria=StoppingCriteriaList([all_ended] if stop_at_sentence else []),
            logits_processor=LogitsProcessorList([adjust]),
            **settings,
        )
    return decode(ids)
