"""Forward passes that resume in the middle: at a column of each row, above a block.

Earlier tokens are prefilled once into a key-value cache, and the blocks below run once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_lightning.base_models.base_model import BaseModel
from kedit_lightning.base_models.blocks import removing
from kedit_lightning.base_models.head_cache import head_cache
from kedit_lightning.base_models.rows import EncodedRow, pad_tails
from kedit_lightning.base_models.taps import skipping, stop_after
from kedit_lightning.edits.projections import first_tensor, with_first

#: Errors of models whose caches or blocks have another form.
_OTHER_FORM = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
#: Largest relative difference of logits of resumed and complete passes, by bytes of the dtype.
SAME = {8: 1e-9, 4: 1e-4, 2: 5e-2}


class Continuation:
    """Repeated forward passes of the same rows, resumed at a column and above a block.

    Models whose passes cannot be resumed, edits that must see whole prompts, and rows with pictures
    get complete passes; the results are the same.

    Args:
        base: The base model, as its stack stands.
        rows: The rows.
        block: Number of the first block that runs again.
        resume: Whether to resume; by default where the model allows it.
        cuts: Index in each prompt of the token at which passes resume; by default that of the last
            token of the subject, which each row then has.
        shared: Number of tokens before it that other rows may begin with, too; read once.
    """

    def __init__(
        self,
        base: BaseModel,
        rows: Sequence[EncodedRow],
        block: int,
        resume: bool | None = None,
        cuts: Sequence[int] | None = None,
        shared: Sequence[int] | None = None,
    ) -> None:
        self.base = base
        self._cache: Any = None
        self._below: tuple[str, ...] = ()
        self._output: Any = None
        self._resumed = False
        if resume is None:
            resume = can_resume(base) and not any(row.images for row in rows)
        if not resume:
            self.rows = base.pad(rows, "right")
            return
        cuts = [row.subject_end for row in rows] if cuts is None else cuts
        head, self.rows = pad_tails(rows, cuts, base.pad_id, base.takes_positions, base.device)
        if not any(cuts):
            width = head["input_ids"].shape[1]
            self.rows.inputs["attention_mask"] = self.rows.attention_mask[:, width:]
        if bool(head["attention_mask"].any()):
            heads = [row.prompt[:at] for row, at in zip(rows, cuts, strict=True)]
            self._cache = head_cache(base, heads, head, shared)
        self._resumed = True
        self._run_below(block)

    def _run_below(self, block: int) -> None:
        """Run the tails through the blocks below one, once."""
        if block <= 0:
            return
        base, names = self.base, [self.base.layout.block_name(index) for index in range(block)]
        last, seen = base.module(names[-1]), list[Any]()
        note = last.register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.no_grad(), removing([note]), stop_after(base.model, names[-1]):
            base.forward(self.rows, **self._options())
        self._below, self._output = tuple(names), seen[-1]

    def above(self, block: int) -> Continuation:
        """The same passes of which only the blocks from number ``block`` on run again."""
        part = copy.copy(self)
        if self._resumed:
            part._below, part._output = (), None
            part._run_below(block)
        return part

    def _options(self) -> dict[str, Any]:
        if self._cache is None:
            return {}
        # A pass appends to its cache, and the next one must find the heads alone.
        return {"past_key_values": copied(self._cache), "use_cache": True}

    def logits_of(self, places: tuple[Tensor, Tensor]) -> Tensor:
        """Logits ``[n, vocab]`` at rows and columns ``[n]``, with the hooks now on the model."""
        with skipping(self.base.model, dict.fromkeys(self._below, self._output)):
            return self.base.logits_of(self.rows, places, **self._options())

    def select(self, index: Tensor) -> Continuation:
        """The same for some of the rows, by number. Shape of ``index``: ``[n]``."""
        part = copy.copy(self)
        part.rows = self.rows.select(index)
        if self._output is not None:
            part._output = with_first(self._output, first_tensor(self._output)[index])
        if self._cache is not None:
            part._cache = self._options()["past_key_values"]
            part._cache.batch_select_indices(index)
        return part


def copied(cache: Any) -> Any:
    """A copy of a cache that may grow and be cut; both share their tensors until then."""
    twin = copy.copy(cache)
    # What follows rows of another cache does not follow these.
    vars(twin).pop("reorder_cache", None)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def can_resume(base: BaseModel) -> bool:
    """Whether passes of a base model can resume in the middle; its architecture is tested once.

    Memory edits decide at the end of a prompt that one call reads, so none may be applied.
    """
    if base.is_encoder_decoder or base.edits.reads_prompts:
        return False
    if base.resumes is None:
        with base.edits.suspended():
            base.resumes = _tried(base)
    return base.resumes


@torch.no_grad()
def _tried(base: BaseModel) -> bool:
    """Compare resumed passes with complete ones."""
    size = int(base.model.config.get_text_config(decoder=True).vocab_size)
    ids = [(7 * i + 3) % size for i in range(12)]
    rows = [
        EncodedRow(tuple(ids[:7]), tuple(ids[7:9]), subject_end=4, subject_start=4),
        EncodedRow(tuple(ids[2:6]), tuple(ids[6:7]), subject_end=1, subject_start=1),
    ]
    depth, tolerance = len(base.layout), SAME[base.dtype.itemsize]
    cuts = [row.subject_end for row in rows]
    for block, at in [(0, cuts), (depth // 2, cuts), (depth, cuts), (depth // 2, [0, 0])]:
        try:
            resumed = _answers(Continuation(base, rows, block, True, at))
            complete = _answers(Continuation(base, rows, block, resume=False))
        except _OTHER_FORM:
            return False
        if not bool((resumed - complete).norm() <= tolerance * complete.norm()):
            return False
    return True


def _answers(passes: Continuation) -> Tensor:
    """First logits of the answers of two rows, and of one of them by itself."""
    logits = []
    for part in (passes, passes.select(torch.tensor([1], device=passes.base.device))):
        at = torch.arange(len(part.rows), device=part.base.device)
        logits.append(part.logits_of((at, part.rows.answer_columns[:, 0])).double())
    return torch.cat(logits)
