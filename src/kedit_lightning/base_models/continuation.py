"""Forward passes that resume in the middle: at a column of each row, above a block.

Earlier tokens are prefilled once into a key-value cache, and the blocks below run once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_lightning.base_models.base_model import BaseModel
from kedit_lightning.base_models.head_cache import head_cache
from kedit_lightning.base_models.rows import EncodedRow, pad_tails
from kedit_lightning.base_models.taps import Call, noting_calls, skipping, stop_after
from kedit_lightning.edits.projections import first_tensor, with_first
from kedit_lightning.errors import ModuleNotLocatedError

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
        changed: All modules of that block that change: what it computes before runs once.
    """

    def __init__(
        self,
        base: BaseModel,
        rows: Sequence[EncodedRow],
        block: int,
        resume: bool | None = None,
        cuts: Sequence[int] | None = None,
        shared: Sequence[int] | None = None,
        changed: Collection[str] = (),
    ) -> None:
        self.base = base
        self._cache: Any = None
        self._changed = tuple(changed)
        #: Outputs of what runs once, by module.
        self._below: dict[str, Any] = {}
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
        """Run what lies below the changes, once."""
        options = self._options()
        self._below = run_below(
            self.base, block, self._changed, lambda: self.base.forward(self.rows, **options)
        )

    def above(self, block: int) -> Continuation:
        """The same passes of which only the blocks from number ``block`` on run again."""
        part = copy.copy(self)
        if self._resumed:
            part._below, part._changed = {}, ()
            part._run_below(block)
        return part

    def _options(self) -> dict[str, Any]:
        if self._cache is None:
            return {}
        # A pass appends to its cache, and the next one must find the heads alone.
        return {"past_key_values": copied(self._cache), "use_cache": True}

    def logits_of(self, places: tuple[Tensor, Tensor]) -> Tensor:
        """Logits ``[n, vocab]`` at rows and columns ``[n]``, with the hooks now on the model."""
        with skipping(self.base.model, self._below):
            return self.base.logits_of(self.rows, places, **self._options())

    def select(self, index: Tensor) -> Continuation:
        """The same for some of the rows, by number. Shape of ``index``: ``[n]``."""
        part = copy.copy(self)
        part.rows = self.rows.select(index)
        part._below = rows_of_outputs(self._below, index)
        if self._cache is not None:
            part._cache = copied(self._cache)
            part._cache.batch_select_indices(index)
        return part


def rows_of_outputs(outputs: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """Outputs of modules for some rows, by number ``[n]``; those of one object stay one."""
    taken = {id(out): with_first(out, first_tensor(out)[index]) for out in outputs.values()}
    return {name: taken[id(out)] for name, out in outputs.items()}


@torch.no_grad()
def run_below(
    base: BaseModel, block: int, changed: Collection[str], run: Callable[[], Any]
) -> dict[str, Any]:
    """What modules give that no change reaches: blocks below one, and its own parts before it.

    Args:
        base: The base model.
        block: Number of the block.
        changed: All modules of that block that change; if none is given, all of it runs again.
        run: Runs the model.

    Returns:
        Outputs in the modules' own form, by name.  Blocks below the last of them have its output,
        as nobody reads theirs.
    """
    names = [base.layout.block_name(index) for index in range(block)]
    own = base.layout.block_name(block) if block < len(base.layout) else ""
    inside = [name for name in changed if f"{name}.".startswith(f"{own}.")]
    if not names and not inside:
        return {}
    inner = [f"{own}.{key}" for key, _ in base.module(own).named_modules() if key and inside]
    ending = stop_after(base.model, own if inside else names[-1])
    with noting_calls(base.model, [*names[-1:], *inner]) as calls, ending:
        run()
    below = dict.fromkeys(names, calls[names[-1]][0].output) if names else {}
    return below | _before(inner, inside, calls)


def _before(
    names: Sequence[str], changed: Collection[str], calls: Mapping[str, Sequence[Call]]
) -> dict[str, Any]:
    """Outputs of the outermost modules that ran once, and ended before all changes began."""
    if not all(name in calls for name in changed):  # the block itself, or a single expert
        return {}
    start = min((call.start for name in changed for call in calls[name]), default=0)
    found: dict[str, Any] = {}
    for name in names:
        ran = calls.get(name, ())
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if len(ran) == 1 and ran[0].end < start and ran[0].has_rows and not nested:
            found[name] = ran[0].output
    return found


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
    cuts, half, written = [row.subject_end for row in rows], depth // 2, _written(base, depth // 2)
    ways: list[tuple[int, list[int], Collection[str]]] = [
        (0, cuts, ()),
        (half, cuts, written),
        (depth, cuts, ()),
        (half, [0, 0], written),
    ]
    for block, at, changed in ways:
        try:
            resumed = _answers(Continuation(base, rows, block, True, at, changed=changed))
            complete = _answers(Continuation(base, rows, block, resume=False))
        except _OTHER_FORM:
            return False
        if not bool((resumed - complete).norm() <= tolerance * complete.norm()):
            return False
    return True


def _written(base: BaseModel, block: int) -> Collection[str]:
    """The module of a block that most edits change."""
    try:
        return (base.layout.mlp_block(block).writer,)
    except ModuleNotLocatedError:
        return ()


def _answers(passes: Continuation) -> Tensor:
    """First logits of the answers of two rows, and of one of them by itself."""
    logits = []
    for part in (passes, passes.select(torch.tensor([1], device=passes.base.device))):
        at = torch.arange(len(part.rows), device=part.base.device)
        logits.append(part.logits_of((at, part.rows.answer_columns[:, 0])).double())
    return torch.cat(logits)
