"""Free generation: continuations of prompts."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from kedit_lightning.base_models.batching import Batching, Decoder, parts_of
from kedit_lightning.base_models.rows import EncodedRow, PaddingSide, TokenRows
from kedit_lightning.base_models.visual_features import VisualFeatures
from kedit_lightning.decoding_settings import generation_config
from kedit_lightning.sentence import answer_text

#: Share of the rows of a pass that must still go on; otherwise the others leave it.
_WORTH = 0.8
#: Inputs that ``generate`` makes itself.
_MADE = ("position_ids", "decoder_input_ids", "decoder_attention_mask")
Ids = TypeVar("Ids", Tensor, list[int])
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
    known = states if beams in (None, 1) else None
    lengths = [len(row.prompt) for row in encoded]
    texts: dict[int, list[str]] = {}
    parts, cut = base.batching.parts(lengths, size), list[int]()
    while parts:
        part = parts.pop(0)
        rows, settings = _prepared(base, [encoded[i] for i in part], known, options)
        # Told once: without a key-value cache every step looks like the first one.
        carried, shown = base.edits.carried_by(part, len(encoded)), base.sight.embedded(rows)
        with carried, shown, base.edits.prompts_end_at(rows.prompt_end):
            found = generate_texts(base.model, base.tokenizer, rows, stop_at_sentence, settings)
        several = len(found) // len(part)  # answers to each prompt, as options may ask
        for n, i in enumerate(part):
            answers = found[n * several : (n + 1) * several]
            texts[i] = [text for text, _ in answers]
            room = min(options["max_new_tokens"], base.max_tokens - lengths[i])
            if settings["max_new_tokens"] < room and not all(ended for _, ended in answers):
                cut.append(i)
        if not parts and cut and not base.is_encoder_decoder:
            # Rows that longer ones beside them left too little room, by themselves.
            alike = parts_of([lengths[i] for i in cut], size, alike=True)
            parts, cut, known = [[cut[n] for n in some] for some in alike], [], None
    return [text for i in range(len(encoded)) for text in texts[i]]


def _prepared(
    base: Generator,
    encoded: Sequence[EncodedRow],
    states: PrefixReader | None,
    options: Mapping[str, Any],
) -> tuple[TokenRows, dict[str, Any]]:
    """Rows that are continued together, padded, and the options of their generation."""
    settings = {"pad_token_id": base.pad_id, **options}
    known = None if states is None else states.prompts(encoded)
    if known is None:
        rows = base.pad(encoded, "left")
    else:
        rows, settings["past_key_values"] = known
    if not base.is_encoder_decoder:
        room = base.max_tokens - rows.inputs["input_ids"].shape[1]
        settings["max_new_tokens"] = max(1, min(settings["max_new_tokens"], room))
    if "cross_attention_states" in rows.types:
        settings["use_cache"] = False  # each step would add the states to the cache again
    return rows, settings


@torch.no_grad()
def greedy_answers(
    base: Generator,
    begun: Sequence[Sequence[int]],
    read: tuple[Tensor, Any],
    ended: Callable[[int, Sequence[int]], bool],
    carrying: Callable[[Sequence[int]], AbstractContextManager[None]],
) -> list[tuple[int, ...]]:
    """Go on greedily with answers until each has ended; rows leave the passes as they end.

    Args:
        base: The base model; no edit on it looks at prompts or logits.
        begun: Ids of each answer so far, at least one; all but the last are read.
        read: Attention mask ``[rows, columns]`` of what is read, and its cache, which is used up.
        ended: Whether the answer of a row, by its number, has ended with these ids.
        carrying: Inside what it gives, the rows of these numbers carry their edits.
    """
    (mask, cache), answers = read, [list(ids) for ids in begun]
    rows = list(range(len(answers)))
    live = [row for row in rows if not ended(row, answers[row])]
    while live:
        if len(live) < len(rows):
            index = torch.tensor([rows.index(row) for row in live], device=mask.device)
            cache.batch_select_indices(index)
            mask, rows = mask[index], live
        vars(cache).pop("reorder_cache", None)  # what is known of other rows
        with carrying(rows):
            while len(live) > _WORTH * len(rows):
                last = torch.tensor([answers[row][-1:] for row in rows], device=mask.device)
                mask = torch.cat([mask, torch.ones_like(last)], dim=1)
                inputs = {"input_ids": last, "attention_mask": mask}
                if base.takes_positions:
                    # Rows whose answers have ended may stand beyond the last position.
                    at = mask.sum(1, keepdim=True) - 1
                    inputs["position_ids"] = at.clamp(max=base.max_tokens - 1)
                options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
                logits = base.model(**inputs, **options).logits[:, -1]
                found = dict(zip(rows, logits.float().argmax(-1).tolist(), strict=True))
                for row in live:
                    answers[row].append(found[row])
                live = [row for row in live if not ended(row, answers[row])]
                if not live:
                    break
    return [tuple(ids) for ids in answers]


@torch.no_grad()
def generate_texts(
    model: Any, tokenizer: Any, rows: TokenRows, stop_at_sentence: bool, options: dict[str, Any]
) -> list[tuple[str, bool]]:
    """Continue left-padded rows: the text of each answer, and whether it has come to an end.

    See :func:`continuations`.  ``options`` go to ``generate`` of transformers, where they have
    precedence over the generation config of the model, which is not changed.
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
    if stops := settings.get("stop_strings", config.get("stop_strings")) or ():
        settings.setdefault("tokenizer", tokenizer)
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
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
        whole = [(decode(row), has_ended) for row, has_ended in answers]
        return [(text, has_ended or any(s in text for s in stops)) for text, has_ended in whole]
    cut = [(until_ended(row, decode), has_ended) for row, has_ended in answers]
    return [(text, has_ended or sentence_ended(text)) for text, has_ended in cut]


def _until_last(ids: Tensor, last: int | Sequence[int] | None) -> tuple[Tensor, bool]:
    """Ids up to a token that ends an answer, and whether there is one.

    Behind it is padding, which may be any token.
    """
    if last is None:
        return ids, False
    ends = torch.isin(ids, torch.tensor(last, device=ids.device)).nonzero()
    return (ids[: int(ends[0]) + 1], True) if len(ends) else (ids, False)


def until_ended(ids: Ids, decode: Callable[[Ids], str]) -> str:
    """Text up to the token that ends the sentence; other rows of the batch may go on longer."""
    lengths = range(len(ids) + 1)
    end = bisect_left(lengths, True, key=lambda n: sentence_ended(decode(ids[:n])))
    return decode(ids[:end])
