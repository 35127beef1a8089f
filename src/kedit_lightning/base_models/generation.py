"""Free generation: continuations of prompts."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
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
    """Continue left-padded rows; see :meth:`BaseModel.generate`.

    ``options`` go to ``generate`` of transformers, where they have precedence over the generation
    config of the model, which is not changed.
    """
    prompt = 1 if "decoder_input_ids" in rows.inputs else rows.inputs["input_ids"].shape[1]

    def decode(ids: Tensor) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def ended(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = [sentence_ended(decode(row[prompt:])) for row in ids]
        return torch.tensor(done, device=ids.device)

    settings = dict(options)
    config = generation_config(model)
    if settings.get("stop_strings", config.get("stop_strings")):
        settings.setdefault("tokenizer", tokenizer)
    criteria = [*settings.pop("stopping_criteria", []), *([ended] if stop_at_sentence else [])]
    ids: Tensor = model.generate(
        **{name: value for name, value in rows.inputs.items() if name not in _MADE},
        stopping_criteria=StoppingCriteriaList(criteria),
        logits_processor=LogitsProcessorList(settings.pop("logits_processor", [])),
        **settings,
    )
    last = settings.get("eos_token_id", config.get("eos_token_id"))
    answers = [_until_last(row[prompt:], last) for row in ids]
    if not stop_at_sentence:
        return [decode(row) for row in answers]
    return [_until_ended(row, decode) for row in answers]


def generation_config(model: Any) -> dict[str, Any]:
    """The generation config that a checkpoint came with, as plain values of JSON."""
    config = getattr(model, "generation_config", None)
    values: dict[str, Any] = {} if config is None else json.loads(config.to_json_string())
    return values


def parts_of(lengths: Sequence[int], size: int, alike: bool) -> list[list[int]]:
    """Numbers of the rows that are continued together, ``size`` at most; ``alike``: of one length.

    >>> parts_of([3, 4, 3], 2, alike=False), parts_of([3, 4, 3], 2, alike=True)
    ([[0, 1], [2]], [[0, 2], [1]])
    """
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length if alike else 0, []).append(i)
    return [
        rows[start : start + size]
        for rows in groups.values()
        for start in range(0, len(rows), size)
    ]


def _until_last(ids: Tensor, last: int | Sequence[int] | None) -> Tensor:
    """Ids up to a token that ends an answer; behind it is padding, which may be any token."""
    if last is None:
        return ids
    ends = torch.isin(ids, torch.tensor(last, device=ids.device)).nonzero()
    return ids[: int(ends[0]) + 1] if len(ends) else ids


def _until_ended(ids: Tensor, decode: Callable[[Tensor], str]) -> str:
    """Text up to the token that ends the sentence; other rows of the batch may go on longer."""
    lengths = range(len(ids) + 1)
    end = bisect_left(lengths, True, key=lambda n: sentence_ended(decode(ids[:n])))
    return decode(ids[:end])
