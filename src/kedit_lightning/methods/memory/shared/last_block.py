"""Passes through the last block alone, for single tokens.

Behind the attention of the last block, no token sees another.  So a change of its MLP at one token
changes the logits of that token only, and the rest of the pass need not run again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.blocks import removing
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.base_models.taps import capture, skipping, visiting
from kedit_lightning.edits.kinds.neurons.neurons import MLPPlace
from kedit_lightning.edits.projections import (
    as_rows,
    check_editable,
    compute_dtype,
    first_tensor,
    with_first,
)
from kedit_lightning.errors import ModuleNotLocatedError
from kedit_lightning.methods.shared.answer_passes import AnswerPasses
from kedit_lightning.requests import EditRequest

#: Largest relative difference of logits of these and of other passes, by bytes of the dtype.
_SAME = {8: 1e-9, 4: 1e-4, 2: 5e-2}
#: Errors of blocks that have another form.
_OTHER_FORM = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def last_mlp(base: BaseModel) -> MLPPlace:
    """The last dense MLP.

    Raises:
        UnsupportedUseError: It cannot be edited.
        ModuleNotLocatedError: No block has a dense MLP of its own.
    """
    block = base.layout.block(base.layout.dense_layers[-1])
    place = MLPPlace(block.projections[0], block.down)
    for name in place:
        check_editable(base.model, name)
    return place


class LastBlockPasses:
    """Repeated passes that add a vector to the output of an MLP at each token before an answer's.

    Where the MLP is not in the last block, or that block cannot run by itself, passes along the
    answers run; results are the same.

    Args:
        base: The base model, as its stack stands.
        place: The MLP.
        requests: Requests with their answers.
    """

    def __init__(self, base: BaseModel, place: MLPPlace, requests: Sequence[EditRequest]) -> None:
        self.base, self.place = base, place
        # All of the block runs, so that what it is made of can be read.
        block = base.layout.block_name(base.layout.first_block([place.writes]))
        self._along = AnswerPasses.of(base, requests, [block], "prompt_end")
        rows = self._along.rows
        #: Number of the request of each token, and the token that shall follow. Shape ``[n]``.
        self.row, slot = rows.answer_mask.nonzero(as_tuple=True)
        self.targets = rows.answer_ids[self.row, slot]
        self._at = self.row, rows.answer_columns[self.row, slot]
        self._chosen = torch.arange(len(self.row), device=self.row.device)
        #: Outputs of modules that do not run again, and the tokens as rows of their own.
        self._stored: dict[str, Any] = {}
        self._tokens = rows
        #: Whether each token is a row of its own, so that some can be dropped.
        self.apart = False
        self._prepare()

    @torch.no_grad()
    def _prepare(self) -> None:
        base, outputs = self.base, dict[str, Any]()

        def keep(name: str) -> Any:
            return lambda module, args, output: outputs.__setitem__(name, output)

        names = self._unchanged()
        handles = [base.module(name).register_forward_hook(keep(name)) for name in names]
        with removing(handles), capture(base.model, [self.place.reads]) as seen:
            #: Logits as the stack stands. Shape ``[n, vocab]``.
            self.logits = self._along.logits()
        dtype = compute_dtype(base.dtype)
        #: Input of the MLP at each token. Shape ``[n, d_in]``.
        self.queries = seen.inputs[self.place.reads][self._at].to(dtype)
        if not names:
            return
        along = self._at
        ids = self._tokens.inputs["input_ids"][along].tolist()
        self._stored = self._gathered(outputs)
        self._tokens = base.pad([EncodedRow((token,), ()) for token in ids])
        self._at = torch.arange(len(ids), device=along[0].device), torch.zeros_like(along[0])
        self.apart = True
        with suppress(*_OTHER_FORM):
            found = self.run(torch.zeros_like(self.logits[:, :1], dtype=dtype))
            difference = (found - self.logits).double().norm() / self.logits.double().norm()
            if float(difference) <= _SAME[base.dtype.itemsize]:
                return
        self._stored, self._at, self.apart = {}, along, False

    def _unchanged(self) -> Sequence[str]:
        """What need not run again: the blocks below the last, and what attention writes in it."""
        layout = self.base.layout
        last = len(layout) - 1
        if last < 1 or layout.first_block([self.place.writes]) != last:
            return ()
        with suppress(ModuleNotLocatedError):
            return layout.block_name(last - 1), layout.attention(last)
        return ()

    def _gathered(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs of modules at the tokens, ``[n, 1, d]`` each, in the module's own form."""
        layout, batch, stored = self.base.layout, len(self._tokens), {}
        for name, output in outputs.items():
            states = first_tensor(output)
            at_tokens = as_rows(states, batch)[self._at]
            stored[name] = with_first(
                output, at_tokens if states.dim() == 2 else at_tokens[:, None]
            )
        below = stored[layout.block_name(len(layout) - 2)]
        blocks = [layout.block_name(index) for index in range(len(layout) - 1)]
        return {**stored, **dict.fromkeys(blocks, below)}

    def run(self, change: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` with a change ``[n, d_out]`` of the MLP's output at each token."""

        def add(x: Tensor, y: Tensor) -> Tensor:
            total = y.to(change.dtype).index_put(self._at, change, accumulate=True)
            return total.to(y.dtype)

        model = self.base.model
        with skipping(model, self._stored), visiting(model, {self.place.writes: add}):
            if self.apart:
                return self.base.logits_of(self._tokens, self._at)
            return self._along.logits()[self._chosen]

    def select(self, index: Tensor) -> LastBlockPasses:
        """The same for some of the tokens, by number. Shape of ``index``: ``[n]``."""
        part = copy.copy(self)
        for name in ("row", "targets", "queries", "logits", "_chosen"):
            setattr(part, name, getattr(self, name)[index])
        if not self.apart:
            part._at = self._at[0][index], self._at[1][index]
            return part
        part._at = self._at[0][: len(index)], self._at[1][: len(index)]
        part._tokens = self._tokens.select(index)
        part._stored = {
            name: with_first(output, first_tensor(output)[index])
            for name, output in self._stored.items()
        }
        return part
