"""What hooks need to know about the rows of a forward pass.

Memory edits decide per row, at the last prompt token, whether they act.  The decision is taken
while the key-value cache is empty and kept for the rest of the answer: it travels with the cache,
so that answers which are written in turns do not disturb each other.  An encoder reads its prompt
once, in generation before the model itself is called: what was read and decided there travels with
its output.
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

from kedit_lightning.errors import UnsupportedUseError

#: Start of the names under which the output of an encoder carries what was read and decided.
_CARRIED = "edits:"


@dataclass
class RowContext:
    """State of the rows that are being answered.

    Args:
        prompt_end: Column of the last prompt token of each row. Shape ``[batch]``.
        prefill: Whether the key-value cache is empty, so that the prompt itself passes through.
        decisions: What memory edits decided at prefill, by module; rows in the first dimension.
        parts: Contexts of rows that carry an edit of their own.
        token_ids: All tokens read so far, padding included; ``None`` when the model was given
            embeddings. Shape ``[batch, tokens]``.
        token_mask: Which of them are no padding. Shape ``[batch, tokens]``.
        has_encoder: Whether an encoder reads the question.
        question_ids: What it has read; ``None`` when it was given embeddings. Shape
            ``[batch, question]``.
        question_mask: Which of that is no padding. Shape ``[batch, question]``.
    """

    prompt_end: Tensor
    prefill: bool = True
    decisions: dict[Hashable, Tensor] = field(default_factory=dict)
    parts: dict[Hashable, RowContext] = field(default_factory=dict)
    token_ids: Tensor | None = None
    token_mask: Tensor | None = None
    has_encoder: bool = False
    question_ids: Tensor | None = None
    question_mask: Tensor | None = None

    def part(self, key: Hashable, rows: Tensor) -> RowContext:
        """The context of some rows, the same one at every step of their answers."""
        part = self.parts.setdefault(key, RowContext(self.prompt_end[rows]))
        part.prefill = self.prefill
        return part

    def reorder(self, beam_index: Tensor) -> None:
        """Follow rows that beam search has moved."""
        for name in ("token_ids", "token_mask", "question_ids", "question_mask"):
            read: Tensor | None = getattr(self, name)
            if read is not None:
                setattr(self, name, read.index_select(0, beam_index.to(read.device)))
        for key, decision in self.decisions.items():
            self.decisions[key] = decision.index_select(0, beam_index.to(decision.device))

    def read(self, ids: Tensor, mask: Tensor) -> None:
        """Take in the tokens of a call. Shape ``[batch, new tokens]`` each."""
        if self.prefill:
            self.token_ids, self.token_mask = ids, mask
        elif self.token_ids is not None and self.token_mask is not None:
            self.token_ids = torch.cat([self.token_ids, ids.to(self.token_ids)], dim=1)
            self.token_mask = torch.cat([self.token_mask, mask.to(self.token_mask)], dim=1)

    def leave_with(self, output: Any) -> None:
        """Give what an encoder has read, and what was decided there, to its output.

        Generation repeats the rows of all tensors of that output where a row has several beams.
        """
        for name, tensor in (*self._of_question().items(), *self.decisions.items()):
            output[f"{_CARRIED}{name}"] = tensor

    def take_from(self, output: Any) -> None:
        """Take what :meth:`leave_with` gave; nothing if the encoder ran before the edit applied."""
        carried = {
            name.removeprefix(_CARRIED): tensor
            for name, tensor in (output.items() if isinstance(output, Mapping) else ())
            if name.startswith(_CARRIED)
        }
        for name in self._of_question():
            setattr(self, name, carried.pop(name, None))
        self.decisions.update(carried)

    def _of_question(self) -> dict[str, Tensor | None]:
        return {"question_ids": self.question_ids, "question_mask": self.question_mask}


def copies_of_rows(batch: int, rows: int) -> int:
    """How many rows of a call stand for each row that edits were given for.

    Beams of a row, and several answers to it, stand side by side.

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
    """Column of the last token that is no padding. Shape ``[batch]`` from ``[batch, tokens]``."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (columns * (attention_mask != 0)).argmax(dim=1)


class _Follower:
    """Stands in for a cache's ``reorder_cache``, so that the context follows beams."""

    def __init__(self, cache: Any, context: RowContext) -> None:
        # A strong reference would make a cycle, and keep the cache alive after its answer.
        self._cache = weakref.ref(cache)
        self.context = context

    def __call__(self, beam_idx: Tensor) -> Any:
        cache: Any = self._cache()
        self.context.reorder(beam_idx)
        return type(cache).reorder_cache(cache, beam_idx)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Follower:
        # A copied cache is being rebuilt: ``memo`` holds it already.
        return _Follower(memo[id(self._cache())], copy.deepcopy(self.context, memo))


def _context_of(cache: Any) -> RowContext | None:
    follower = vars(cache).get("reorder_cache")
    return follower.context if isinstance(follower, _Follower) else None


def _is_filled(cache: Any) -> bool:
    if cache is None:
        return False
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError:  # a state-space model: no layer of its cache counts tokens
        return bool(cache.has_previous_state())


class ContextTracker:
    """Keeps the row context of a model's calls, by hooks before and after its forward pass.

    Callers that know where prompts end (rows with teacher-forced answers) set ``given`` first;
    otherwise the prompt is taken to end at the last attended token of the prefill, or in a decoder
    with an encoder at its start token.

    Args:
        model: The language model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._signature = inspect.signature(model.forward)
        self.is_encoder_decoder = bool(
            getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        )
        self.given: Tensor | None = None
        #: Context of the call that runs now; ``None`` between calls of the model.
        self.current: RowContext | None = None
        self._in_encoder = False

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open a context at prefill, and find it again in decode steps.

        Raises:
            UnsupportedUseError: A prompt is read in pieces, so that its end cannot be told.
        """
        call = self._signature.bind_partial(*args, **kwargs).arguments
        cache = call.get("past_key_values", call.get("cache_params"))
        given = call.get("decoder_input_ids" if self.is_encoder_decoder else "input_ids")
        ids = given
        if ids is None:
            ids = next(t for t in call.values() if isinstance(t, Tensor))
        if _is_filled(cache):
            if ids.shape[1] > 1:
                raise UnsupportedUseError(
                    f"the model was called with {ids.shape[1]} new tokens on top of a filled "
                    "key-value cache, and edits with a memory decide at the end of a prompt that "
                    "is read in one call; start each prompt with an empty cache, do without "
                    "prefill_chunk_size and assisted decoding, or roll those edits back"
                )
            # A cache that was filled before the edit was applied knows no decision.
            known = _context_of(cache)
            self.current = known or RowContext(torch.zeros(len(ids), dtype=torch.long))
            self.current.prefill = False
            self._read(given, self._mask_of(call))
            return
        self.current = RowContext(self._prompt_end(ids, self._mask_of(call)))
        self._read(given, self._mask_of(call))
        if self.is_encoder_decoder:
            self._read_question(call)
        self._attach(cache)

    def enter_encoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Open a context where generation runs an encoder before it calls the model."""
        if self.current is not None:
            return
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        ids = next(t for t in call.values() if isinstance(t, Tensor))
        self.current = RowContext(torch.zeros(len(ids), dtype=torch.long))
        self._in_encoder = True
        self._read_question(call)

    def leave_encoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Close that context, and leave what it holds with the encoder's output."""
        if self.current is not None and self._in_encoder:
            if output is not None:
                self.current.leave_with(output)
            self.current, self._in_encoder = None, False

    def _read_question(self, call: Mapping[str, Any]) -> None:
        assert self.current is not None
        self.current.has_encoder = True
        ids: Tensor | None = call.get("input_ids")
        mask: Any = call.get("attention_mask")
        if call.get("encoder_outputs") is not None:
            self.current.take_from(call["encoder_outputs"])
        elif ids is not None:
            self.current.question_ids = ids
            given = isinstance(mask, Tensor) and mask.dim() == 2
            self.current.question_mask = (mask if given else torch.ones_like(ids)).bool()

    def _mask_of(self, call: Mapping[str, Any]) -> Any:
        return call.get("decoder_attention_mask" if self.is_encoder_decoder else "attention_mask")

    def _read(self, ids: Tensor | None, mask: Any) -> None:
        assert self.current is not None
        if ids is None:  # embeddings, which tell no token
            self.current.token_ids = self.current.token_mask = None
            return
        known = isinstance(mask, Tensor) and mask.dim() == 2
        new = mask[:, -ids.shape[1] :] if known else torch.ones_like(ids)
        self.current.read(ids, new.bool())

    def _prompt_end(self, ids: Tensor, mask: Any) -> Tensor:
        if self.given is not None:
            # Beams and several answers to one prompt stand side by side.
            return self.given.repeat_interleave(len(ids) // len(self.given))
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = torch.ones(ids.shape[:2], device=ids.device)
        mask = mask[:, -ids.shape[1] :]
        if self.is_encoder_decoder:  # the start token, the first that is no padding
            start: Tensor = (mask != 0).int().argmax(dim=1)
            return start
        return last_attended(mask)

    def leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Give the context to a cache that the model has made itself, and close it."""
        for name in ("past_key_values", "cache_params"):
            self._attach(getattr(output, name, None))
        self.current = None

    def _attach(self, cache: Any) -> None:
        if hasattr(cache, "reorder_cache") and self.current is not None:
            cache.reorder_cache = _Follower(cache, self.current)
