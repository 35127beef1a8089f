"""Free generation: continuations of prompts."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from kedit_lightning.base_models.batching import Batching, Decoder
from kedit_lightning.base_models.rows import EncodedRow, PaddingSide, TokenRows
from kedit_lightning.base_models.visual_features import VisualFeatures
from kedit_lightning.decoding_settings import generation_config
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


class Generator(Decoder, Protocol):
    """What free generation needs of a base model, beside batching."""

    tokenizer: Any
    batching: Batching
    sight: VisualFeatures

    @property
    def max_tokens(self) -> int:
        """Longest row it can take."""

    def pad(
        self, encoded: Sequence[EncodedRow], padding_side: PaddingSide | None = None
    ) -> TokenRows:
        """Align and pad rows."""


class PrefixReader(Protocol):
    """What is known of the beginning of prompts; see ``prefix_states``."""

    def prompts(self, encoded: Sequence[EncodedRow]) -> tuple[TokenRows, Any] | None:
        """Padded prompts and the cache of their common beginning, where they have one."""


def continuations(
    base: Generator,
    encoded: Sequence[EncodedRow],
    size: int,
    stop_at_sentence: bool,
    options: dict[str, Any],
) -> list[str]:
    """Continue prompts, ``size`` together at most; see :meth:`BaseModel.generate`.

    Among the options, ``prefix_states`` reads the common beginning of prompts once.
    """
    states: PrefixReader | None = options.pop("prefix_states", None)
    beams = options.get("num_beams", generation_config(base.model).get("num_beams"))
    texts: list[tuple[int, str]] = []
    for part in base.batching.parts([len(row.prompt) for row in encoded], size):
        own = [encoded[i] for i in part]
        settings = {"pad_token_id": base.pad_id, **options}
        known = states.prompts(own) if states is not None and beams in (None, 1) else None
        if known is None:
            rows = base.pad(own, "left")
        else:
            rows, settings["past_key_values"] = known
        if not base.is_encoder_decoder:
            room = base.max_tokens - rows.inputs["input_ids"].shape[1]
            settings["max_new_tokens"] = max(1, min(settings["max_new_tokens"], room))
        # Told once: without a key-value cache every step looks like the first one.
        if "cross_attention_states" in rows.types:
            settings["use_cache"] = False  # each step would add the states to the cache again
        carried, shown = base.edits.carried_by(part, len(encoded)), base.sight.embedded(rows)
        with carried, shown, base.edits.prompts_end_at(rows.prompt_end):
            answers = generate_texts(base.model, base.tokenizer, rows, stop_at_sentence, settings)
        several = len(answers) // len(part)  # answers to each prompt, as options may ask
        texts += zip([i for i in part for _ in range(several)], answers, strict=True)
    return [text for _, text in sorted(texts, key=itemgetter(0))]


@torch.no_grad()
def generate_texts(
    model: Any, tokenizer: Any, rows: TokenRows, stop_at_sentence: bool, options: dict[str, Any]
) -> list[str]:
    """Continue left-padded rows; see :func:`continuations`.

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
        **{name: value for name, value in rows.call.items() if name not in _MADE},
        stopping_criteria=StoppingCriteriaList(criteria),
        logits_processor=LogitsProcessorList(settings.pop("logits_processor", [])),
        **settings,
    )
    last = settings.get("eos_token_id", config.get("eos_token_id"))
    answers = [_until_last(row[prompt:], last) for row in ids]
    if not stop_at_sentence:
        return [decode(row) for row in answers]
    return [_until_ended(row, decode) for row in answers]


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
