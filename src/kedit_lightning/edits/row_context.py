"""The row context: what forward hooks know about the rows of a call.

Memory edits decide for each row, at the last prompt token, whether they act.  They decide during
prefill, while the key-value (KV) cache is empty, and the decision holds for the rest of the answer.
It is stored with the cache, so that answers which are generated in turns do not disturb each other,
and it follows the beams of beam search.  An encoder runs once, in generation before the model
itself is called: its token ids and the decisions taken there are stored with its output.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kedit_lightning.errors import UnsupportedUseError

#: Prefix of our entries in the output of an encoder.
_PREFIX = "edits:"


@dataclass
class RowContext:
    """State of the rows of a forward pass, kept until their answers are complete.

    Args:
        prompt_end: Column of the last prompt token of each row. Shape ``[batch]``.
        prefill: Whether the KV cache is empty, so that this call reads the prompt.
        columns: Number of columns read so far, those of this call included.
        logit_places: Rows and columns of this call's logits, ``[n]`` each; ``None`` when they are
            those of the last columns of every row.
        decisions: Decisions of memory edits at prefill, by family; rows in the first dimension.
        parts: Contexts of the rows that carry an edit of their own.
        token_ids: All tokens read so far, padding included; ``None`` when the model was given
            embeddings. Shape ``[batch, tokens]``.
        token_mask: False on padding. Shape ``[batch, tokens]``.
        has_encoder: Whether an encoder reads the question.
        question_ids: Tokens of the encoder; ``None`` when it was given embeddings. Shape
            ``[batch, question]``.
        question_mask: False on padding. Shape ``[batch, question]``.
    """

    prompt_end: Tensor
    prefill: bool = True
    columns: int = 0
    logit_places: tuple[Tensor, Tensor] | None = None
    decisions: dict[Hashable, Tensor] = field(default_factory=dict)
    parts: dict[Hashable, RowContext] = field(default_factory=dict)
    token_ids: Tensor | None = None
    token_mask: Tensor | None = None
    has_encoder: bool = False
    question_ids: Tensor | None = None
    question_mask: Tensor | None = None

    def part(self, key: Hashable, rows: Tensor) -> RowContext:
        """The context of some rows, the same one at every decoding step."""
        part = self.parts.setdefault(key, RowContext(self.prompt_end[rows]))
        part.prefill = self.prefill
        return part

    def reorder(self, beam_index: Tensor) -> None:
        """Reorder rows as beam search does. Shape ``[batch]``."""
        for name in ("token_ids", "token_mask", "question_ids", "question_mask"):
            tokens: Tensor | None = getattr(self, name)
            if tokens is not None:
                setattr(self, name, tokens.index_select(0, beam_index.to(tokens.device)))
        for key, decision in self.decisions.items():
            self.decisions[key] = decision.index_select(0, beam_index.to(decision.device))

    def read(self, ids: Tensor, mask: Tensor) -> None:
        """Append the tokens of a call. Shape ``[batch, new tokens]`` each."""
        if self.prefill:
            self.token_ids, self.token_mask = ids, mask
        elif self.token_ids is not None and self.token_mask is not None:
            self.token_ids = torch.cat([self.token_ids, ids.to(self.token_ids)], dim=1)
            self.token_mask = torch.cat([self.token_mask, mask.to(self.token_mask)], dim=1)

    def store_in(self, output: Any) -> None:
        """Store the question and the decisions in the output of an encoder.

        Generation repeats the rows of all tensors of that output where a row has several beams.
        """
        for name, tensor in (*self._question().items(), *self.decisions.items()):
            output[f"{_PREFIX}{name}"] = tensor

    def load_from(self, output: Any) -> None:
        """Load what :meth:`store_in` stored; nothing if the encoder ran before the edit applied."""
        stored = {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in (output.items() if isinstance(output, Mapping) else ())
            if name.startswith(_PREFIX)
        }
        for name in self._question():
            setattr(self, name, stored.pop(name, None))
        self.decisions.update(stored)

    def _question(self) -> dict[str, Tensor | None]:
        return {"question_ids": self.question_ids, "question_mask": self.question_mask}


def copies_of_rows(batch: int, rows: int) -> int:
    """How often each row that edits were given for is repeated in a call.

    Beams of a row, and several answers to it, are neighbours.

    Args:
        batch: Rows of the call.
        rows: Rows that edits were given for.

    Raises:
        UnsupportedUseError: The call has other rows.
    """
    copies, rest = divmod(batch, rows)
    if rest:
        raise UnsupportedUseError(
            f"edits were given for {rows} rows, and the model was called with {batch}; "
            "give one edit, or None, for each row"
        )
    return copies


def last_attended(attention_mask: Tensor) -> Tensor:
    """Column of the last attended token. Shape ``[batch]`` from ``[batch, tokens]``."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (columns * (attention_mask != 0)).argmax(dim=1)


class _BeamReorder:
    """Replaces a cache's ``reorder_cache``, so that the row context follows the beams."""

    def __init__(self, cache: Any, context: RowContext) -> None:
        # A strong reference would be a cycle, and keep the cache alive after its answer.
        self._cache = weakref.ref(cache)
        self.context = context

    def __call__(self, beam_idx: Tensor) -> Any:
        cache: Any = self._cache()
        self.context.reorder(beam_idx)
        return type(cache).reorder_cache(cache, beam_idx)

    def __deepcopy__(self, memo: dict[int, Any]) -> _BeamReorder:
        # The cache is being copied: ``memo`` holds the copy already.
        return _BeamReorder(memo[id(self._cache())], copy.deepcopy(self.context, memo))


def _context_of(cache: Any) -> RowContext | None:
    reorder = vars(cache).get("reorder_cache")
    return reorder.context if isinstance(reorder, _BeamReorder) else None


def _is_filled(cache: Any) -> bool:
    if cache is None:
        return False
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError:  # a state-space model, whose cache counts no tokens
        return bool(cache.has_previous_state())


class ContextTracker:
    """Keeps the row context of a model's calls, by hooks before and after its forward pass.

    Prompts end at ``prompt_ends`` where a caller has set it, as for teacher-forced answers.
    Otherwise they end at the last attended token of the prefill, or in a decoder with an encoder at
    its start token.

    Args:
        model: The language model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._signature = inspect.signature(model.forward)
        self.is_encoder_decoder = bool(
            getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        )
        self.prompt_ends: Tensor | None = None
        self.logit_places: tuple[Tensor, Tensor] | None = None
        #: Context of the current call; ``None`` between calls of the model.
        self.current: RowContext | None = None
        self._decides = False
        self._in_encoder = False

    def register(self, with_encoder: bool, decides: bool) -> list[RemovableHandle]:
        """Register the hooks.

        Args:
            with_encoder: Whether a decision may be taken in the encoder, if there is one.
            decides: Whether edits decide at the end of the prompt, which must then be read in one
                call.
        """
        self._decides = decides
        handles = []
        if with_encoder and self.is_encoder_decoder:
            encoder: nn.Module = self._model.get_encoder()  # type: ignore[operator]
            handles = [
                encoder.register_forward_pre_hook(self.enter_encoder, with_kwargs=True),
                encoder.register_forward_hook(self.leave_encoder, always_call=True),
            ]
        return [
            *handles,
            self._model.register_forward_pre_hook(self.enter, with_kwargs=True),
            self._model.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
        ]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open a context at prefill, and take it from the cache in decoding steps.

        Raises:
            UnsupportedUseError: A prompt is read in several calls, so that its end is unknown.
        """
        call = self._signature.bind_partial(*args, **kwargs).arguments
        cache = call.get("past_key_values", call.get("cache_params"))
        given = call.get("decoder_input_ids" if self.is_encoder_decoder else "input_ids")
        ids = given
        if ids is None:
            ids = next(t for t in call.values() if isinstance(t, Tensor))
        if _is_filled(cache):
            if ids.shape[1] > 1 and self._decides:
                raise UnsupportedUseError(
                    f"the model was called with {ids.shape[1]} new tokens on top of a filled "
                    "key-value cache, and edits with a memory decide at the end of a prompt that "
                    "is read in one call; start each prompt with an empty cache, do without "
                    "prefill_chunk_size and assisted decoding, or roll those edits back"
                )
            # A cache that was filled before the edit was applied has no context.
            known = _context_of(cache)
            self.current = known or RowContext(torch.zeros(len(ids), dtype=torch.long))
            self.current.prefill = False
        else:
            self.current = RowContext(self._prompt_end(ids, self._mask_of(call)))
        self.current.columns += ids.shape[1]
        self.current.logit_places = self.logit_places
        self._read(given, self._mask_of(call))
        if self.current.prefill:
            if self.is_encoder_decoder:
                self._read_question(call)
            self._attach(cache)

    def enter_encoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Open a context when generation runs the encoder before it calls the model."""
        if self.current is not None:
            return
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        ids = next(t for t in call.values() if isinstance(t, Tensor))
        self.current = RowContext(torch.zeros(len(ids), dtype=torch.long))
        self._in_encoder = True
        self._read_question(call)

    def leave_encoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Close that context, and store it in the encoder's output."""
        if self.current is not None and self._in_encoder:
            if output is not None:
                self.current.store_in(output)
            self.current, self._in_encoder = None, False

    def _read_question(self, call: Mapping[str, Any]) -> None:
        assert self.current is not None
        self.current.has_encoder = True
        ids: Tensor | None = call.get("input_ids")
        mask: Any = call.get("attention_mask")
        if call.get("encoder_outputs") is not None:
            self.current.load_from(call["encoder_outputs"])
        elif ids is not None:
            self.current.question_ids = ids
            given = isinstance(mask, Tensor) and mask.dim() == 2
            self.current.question_mask = (mask if given else torch.ones_like(ids)).bool()

    def _mask_of(self, call: Mapping[str, Any]) -> Any:
        return call.get("decoder_attention_mask" if self.is_encoder_decoder else "attention_mask")

    def _read(self, ids: Tensor | None, mask: Any) -> None:
        assert self.current is not None
        if ids is None:  # the model was given embeddings
            self.current.token_ids = self.current.token_mask = None
            return
        known = isinstance(mask, Tensor) and mask.dim() == 2
        new = mask[:, -ids.shape[1] :] if known else torch.ones_like(ids)
        self.current.read(ids, new.bool())

    def _prompt_end(self, ids: Tensor, mask: Any) -> Tensor:
        if self.prompt_ends is not None:
            # Beams and several answers to one prompt are neighbours.
            return self.prompt_ends.repeat_interleave(len(ids) // len(self.prompt_ends))
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = torch.ones(ids.shape[:2], device=ids.device)
        mask = mask[:, -ids.shape[1] :]
        if self.is_encoder_decoder:  # the start token, which follows the padding
            start: Tensor = (mask != 0).int().argmax(dim=1)
            return start
        return last_attended(mask)

    def leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Store the context with a cache that the model created itself, and close it."""
        for name in ("past_key_values", "cache_params"):
            self._attach(getattr(output, name, None))
        self.current = None

    def _attach(self, cache: Any) -> None:
        if hasattr(cache, "reorder_cache") and self.current is not None:
            cache.reorder_cache = _BeamReorder(cache, self.current)
