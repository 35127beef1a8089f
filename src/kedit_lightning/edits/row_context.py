"""The row context: what forward hooks know about the rows of a call.

Memory edits decide during prefill, while the key-value (KV) cache is empty; the decision is stored
with the cache and follows the beams.  What is decided in an encoder is stored with its output.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kedit_lightning.edits.beam_reorder import BeamReorder, columns_in, context_of
from kedit_lightning.errors import UnsupportedUseError

#: Prefix of our entries in the output of an encoder.
_PREFIX = "edits:"
_QUESTION = ("question_ids", "question_mask")


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
        token_ids: All tokens read so far, ``[batch, tokens]``; ``None`` for embeddings.
        token_mask: False on padding. Shape ``[batch, tokens]``.
        has_encoder: Whether an encoder reads the question.
        question_ids: Tokens of the encoder, ``[batch, question]``; ``None`` for embeddings.
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
        for name in ("token_ids", "token_mask", *_QUESTION):
            tokens: Tensor | None = getattr(self, name)
            if tokens is not None:
                setattr(self, name, tokens.index_select(0, beam_index.to(tokens.device)))
        for key, decision in self.decisions.items():
            self.decisions[key] = decision.index_select(0, beam_index.to(decision.device))

    def read(self, ids: Tensor | None, mask: Tensor, start: int) -> None:
        """Append the tokens of a call, ``[batch, new tokens]``, from the column ``start`` on.

        Assisted decoding takes back the last columns that it had guessed.  Ids are ``None`` if the
        call has embeddings.
        """
        self.columns = start + mask.shape[1]
        if ids is None:
            self.token_ids = self.token_mask = None
        elif self.prefill:
            self.token_ids, self.token_mask = ids, mask
        elif self.token_ids is not None and self.token_mask is not None:
            ids, mask = ids.to(self.token_ids), mask.to(self.token_mask)
            self.token_ids = torch.cat([self.token_ids[:, :start], ids], dim=1)
            self.token_mask = torch.cat([self.token_mask[:, :start], mask], dim=1)

    def store_in(self, output: Any) -> None:
        """Store the question and the decisions in the output of an encoder.

        Generation repeats the rows of all tensors of that output where a row has several beams.
        """
        question = {name: getattr(self, name) for name in _QUESTION}
        for name, tensor in (*question.items(), *self.decisions.items()):
            output[f"{_PREFIX}{name}"] = tensor

    def load_from(self, output: Any) -> None:
        """Load what :meth:`store_in` stored; nothing if the encoder ran before the edit applied."""
        entries = output if isinstance(output, Mapping) else {}
        names = [name for name in entries if name.startswith(_PREFIX)]
        stored = {name.removeprefix(_PREFIX): entries[name] for name in names}
        for name in _QUESTION:
            setattr(self, name, stored.pop(name, None))
        self.decisions.update(stored)


def copies_of_rows(batch: int, rows: int) -> int:
    """How often a call of ``batch`` rows repeats each of the ``rows`` that edits were given for.

    Beams of a row, and several answers to it, are neighbours.

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


def _attended(mask: Any, ids: Tensor) -> Tensor:
    """Which tokens of a call are no padding; all of them without a mask. ``[batch, tokens]``."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -ids.shape[1] :].bool()
    return torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)


def _first_tensor(call: Mapping[str, Any]) -> Tensor:
    return next(value for value in call.values() if isinstance(value, Tensor))


class ContextTracker:
    """Keeps the row context of a model's calls, by hooks before and after its forward pass.

    Prompts end at ``prompt_ends`` where a caller has set it, as for teacher-forced answers.
    Otherwise they end at the last attended token of the prefill, or in a decoder with an encoder at
    its start token.

    One call must read a prompt to its end, since decisions look at all of it.  That end is known
    where a caller has set it, and inside ``generate``, which :class:`BoundedGenerate` tells of.  In
    a loop of calls of the model itself a first call of several tokens is taken for the prompt, and
    one of a single token may be either: the next call is refused.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._signature = inspect.signature(model.forward)
        config = getattr(model, "config", None)
        self.is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.prompt_ends: Tensor | None = None
        #: Whether they are columns of each call, and not of all that its cache holds.
        self.ends_here = False
        #: Columns of the prompts that ``generate`` continues now.
        self.prompt_columns: int | None = None
        #: Whether decisions matter: edits act, and this model does not just guess for another.
        self.acts = self.answers = True
        self.logit_places: tuple[Tensor, Tensor] | None = None
        #: Context of the current call; ``None`` between calls of the model.
        self.current: RowContext | None = None
        self._decides = False
        self._in_encoder = False

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextTracker:
        twin = copy.copy(self)
        twin._model, twin.current = memo.get(id(self._model), self._model), None
        memo[id(self)] = twin
        return twin

    @contextmanager
    def told(self, **facts: Any) -> Iterator[None]:
        """Inside, a caller has set some of what is known of the calls of the model."""
        before = {name: getattr(self, name) for name in facts}
        vars(self).update(facts)
        try:
            yield
        finally:
            vars(self).update(before)

    def encoders(self) -> list[nn.Module]:
        """The encoder of a model that has one, which ``generate`` calls before the model."""
        if not self.is_encoder_decoder:
            return []
        return [self._model.get_encoder()]  # type: ignore[operator]

    def register(self, with_encoder: bool, decides: bool) -> list[RemovableHandle]:
        """Register the hooks.

        Args:
            with_encoder: Whether a decision may be taken in the encoder, if there is one.
            decides: Whether edits decide at the end of the prompt, which one call must then read.
        """
        self._decides = decides
        handles = []
        for encoder in self.encoders() if with_encoder else []:
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
        side = "decoder_" if self.is_encoder_decoder else ""
        given = call.get(f"{side}input_ids")
        ids = _first_tensor(call) if given is None else given
        attended = _attended(call.get(f"{side}attention_mask"), ids)
        start = columns_in(cache)
        # A cache that was filled before the edit was applied has no context.
        known = context_of(cache) if start else None
        reads_end = not start or self.ends_here
        if self._decides and self.acts and self.answers and not (start and reads_end):
            self._check_bounds(call, known, start, ids.shape[1])
        if not reads_end:
            self.current = known or RowContext(torch.zeros(len(ids), dtype=torch.long))
            self.current.prefill = False
        else:
            self.current = RowContext(self._prompt_end(attended))
        self.current.logit_places = self.logit_places
        self.current.read(given, attended, start)
        if self.current.prefill:
            if self.is_encoder_decoder:
                self._read_question(call)
            self._attach(cache)

    def _check_bounds(
        self, call: Mapping[str, Any], known: RowContext | None, start: int, new: int
    ) -> None:
        """Refuse a call of ``new`` columns behind ``start`` others that leaves a prompt's end open.

        Raises:
            UnsupportedUseError: The message names the ways out.
        """
        width = self._prompt_width()
        told = width is not None
        if known is not None and width is None:  # a cache may have been cut inside its prompt
            width = int(known.prompt_end.max()) + 1
        if "cu_seq_lens_q" in call.get("kwargs", {}):
            what = "was called with several prompts in one row, as continuous batching does"
        elif width is not None and (start < width if start else new < width):
            what = f"was called with {new} new tokens of a prompt of {width} columns"
        elif not told and start and new > 1:
            what = f"was called with {new} new tokens on top of a filled key-value cache"
        elif not told and start == 1:
            what = (
                "was called with one new token on top of another, which may be a prompt that is "
                "read token by token, or the answer to a prompt of one token"
            )
        else:
            return
        raise UnsupportedUseError(
            f"the model {what}, and edits with a memory decide at the end of a prompt that is read "
            "in one call; start each prompt with an empty cache, do without prefill_chunk_size, "
            "let `generate` write the answers or say where prompts end (`with "
            "base.edits.prompts_end_at(columns)`), or roll those edits back"
        )

    def _prompt_width(self) -> int | None:
        """Columns in which all prompts end, if they are known."""
        if self.is_encoder_decoder:  # the start token
            return 1
        if self.prompt_ends is not None:
            return int(self.prompt_ends.max()) + 1
        return self.prompt_columns

    def enter_encoder(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Open a context when generation runs the encoder before it calls the model."""
        if self.current is not None:
            return
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        self.current = RowContext(torch.zeros(len(_first_tensor(call)), dtype=torch.long))
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
        if call.get("encoder_outputs") is not None:
            self.current.load_from(call["encoder_outputs"])
        elif ids is not None:
            self.current.question_ids = ids
            self.current.question_mask = _attended(call.get("attention_mask"), ids)

    def _prompt_end(self, attended: Tensor) -> Tensor:
        if self.prompt_ends is not None:
            # Beams and several answers to one prompt are neighbours.
            return self.prompt_ends.repeat_interleave(len(attended) // len(self.prompt_ends))
        if self.is_encoder_decoder:  # the start token, which follows the padding
            return attended.int().argmax(dim=1)
        # Assisted decoding reads the tokens that it guesses along with the prompt.
        prompt = attended[:, : self.prompt_columns]
        return (torch.arange(prompt.shape[1], device=prompt.device) * prompt).argmax(dim=1)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Store the context with a cache that the model created itself, and close it."""
        for name in ("past_key_values", "cache_params"):
            self._attach(getattr(output, name, None))
        self.current = None

    def _attach(self, cache: Any) -> None:
        if hasattr(cache, "reorder_cache") and self.current is not None:
            cache.reorder_cache = BeamReorder(cache, self.current)
