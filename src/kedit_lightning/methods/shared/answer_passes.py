"""Repeated forward passes along answers, of which only what a change can reach runs again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, TokenRows
from kedit_lightning.base_models.continuation import Continuation
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.requests import EditRequest

#: Tokens whose hidden states a change reaches: all, or those from the last one of the prompt on.
Reach: TypeAlias = Literal["all", "prompt_end"]
#: Where answer tokens are predicted: each behind those before it, or all at the end of the prompt.
Objective: TypeAlias = Literal["target_new", "prompt_last"]


def answered_rows(base: BaseModel, requests: Sequence[EditRequest]) -> TokenRows:
    """Token rows of requests: their prompts and pictures, with their new answers."""
    return base.pad(encoded_answers(base, requests))


def encoded_answers(base: BaseModel, requests: Iterable[EditRequest]) -> list[EncodedRow]:
    """The row of each request, not padded: its prompt and pictures, with its new answer."""
    return [base.encode(r.prompt, r.target_new, image=r.image) for r in requests]


class AnswerPasses:
    """Forward passes of the same prompts and answers while some modules change.

    What lies below the changed modules is computed once for each row.  A pass runs the blocks from
    there on, with the hooks that are on the model then, and projects to the vocabulary only the
    hidden states that predict an answer token.  A model that cannot be continued from a block, or
    that carries edits which must see whole prompts, runs complete passes, with the same results.

    Args:
        base: The base model, as its stack stands.
        encoded: The rows, each with an answer.
        modules: The modules that change: projections, or whole blocks.
        reach: Tokens at which they change.  With ``prompt_end`` the tokens before are read once.
    """

    def __init__(
        self,
        base: BaseModel,
        encoded: Sequence[EncodedRow],
        modules: Iterable[str],
        reach: Reach = "all",
    ) -> None:
        self.base = base
        block = base.layout.first_block(modules := tuple(modules))
        cuts = [len(row.prompt) - 1 if reach == "prompt_end" else 0 for row in encoded]
        self._place(Continuation(base, encoded, block, cuts=cuts, changed=modules))

    @classmethod
    def of(
        cls,
        base: BaseModel,
        requests: Iterable[EditRequest],
        modules: Iterable[str],
        reach: Reach = "all",
    ) -> AnswerPasses:
        """Passes of the prompts of requests with their new answers."""
        encoded = encoded_answers(base, requests)
        return cls(base, encoded, modules, reach)

    def _place(self, passes: Continuation) -> None:
        self._passes, rows = passes, passes.rows
        self._row, self._slot = rows.answer_mask.nonzero(as_tuple=True)
        self._ids = rows.answer_ids[self._row, self._slot]
        self._columns = rows.answer_columns[self._row, self._slot]
        self._number = torch.arange(len(rows), device=self._row.device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rows(self) -> TokenRows:
        """The rows as hooks see them: columns are counted from where passes start."""
        return self._passes.rows

    def select(self, index: Tensor) -> AnswerPasses:
        """The same for some of the rows, by number. Shape of ``index``: ``[n]``."""
        part = copy.copy(self)
        part._place(self._passes.select(index))
        return part

    def logits(self, objective: Objective = "target_new") -> Tensor:
        """Logits that predict each answer token, row after row. Shape ``[answer tokens, vocab]``.

        They belong to the rows and slots of ``rows.answer_mask.nonzero()``.
        """
        if objective == "prompt_last":
            ends = self._passes.logits_of((self._number, self.rows.prompt_end))
            return ends[self._row]
        return self._passes.logits_of((self._row, self._columns))

    def log_probs(self, objective: Objective = "target_new") -> Tensor:
        """Log-probability of each answer token, in at least float32, 0 on padding.

        Shape ``[batch, width]``, as ``rows.answer_ids``.
        """
        logits = self.logits(objective)
        logs = logits.to(compute_dtype(logits.dtype)).log_softmax(-1)
        chosen = logs.gather(-1, self._ids.to(logs.device)[:, None])[:, 0]
        shape = self.rows.answer_ids.shape
        places = self._row.to(logs.device), self._slot.to(logs.device)
        return chosen.new_zeros(shape).index_put(places, chosen)

    def losses(self, objective: Objective = "target_new") -> Tensor:
        """Mean negative log-likelihood of each row's answer. Shape ``[batch]``."""
        log_probs = self.log_probs(objective)
        lengths = self.rows.answer_mask.sum(-1).to(log_probs)
        return -log_probs.sum(-1) / lengths
