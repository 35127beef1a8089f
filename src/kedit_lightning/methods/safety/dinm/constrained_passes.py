"""Passes along the replies of requests, and along answers that should stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.shared.answer_passes import AnswerPasses


def row_divergences(log_probs: Tensor, before: Tensor, rows: Tensor, count: int) -> Tensor:
    """Mean over the tokens of each row of ``KL(now || before)``, in nats.

    Tokens that the model now rules out add nothing, nor to the gradient.

    Args:
        log_probs: Log-probabilities of the changed model. Shape ``[tokens, vocab]``.
        before: Those of the model as it was. Shape ``[tokens, vocab]``.
        rows: Row of each token. Shape ``[tokens]``.
        count: Number of rows, each with a token at least.

    Returns:
        Shape ``[count]``.
    """
    possible = torch.isfinite(log_probs)
    now, then = (torch.where(possible, logs, 0.0) for logs in (log_probs, before))
    terms = torch.where(possible, now.exp() * (now - then), 0.0).sum(-1)
    zeros = terms.new_zeros(count)
    lengths = zeros.index_add(0, rows, torch.ones_like(terms))
    return zeros.index_add(0, rows, terms) / lengths


@dataclass(frozen=True)
class ConstrainedPasses:
    """Passes of each request along its reply, and along the answer of its constraint.

    Args:
        replies: Along the replies.
        kept: Along the answers that should stay, a row a request.
        before: What predicts them before the change, as log-probabilities. Shape ``[answer tokens
            of kept, vocab]``.
    """

    replies: AnswerPasses
    kept: AnswerPasses
    before: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, replies: AnswerPasses, kept: AnswerPasses) -> Self:
        """Passes of a model that has not changed yet."""
        return cls(replies, kept, _log_probs(kept))

    def select(self, index: Tensor) -> Self:
        """The same for some of the requests, by number, in order. Shape of ``index``: ``[n]``."""
        here = torch.isin(_rows(self.kept), index.to(self.kept.rows.answer_mask.device))
        before = self.before[here.to(self.before.device)]
        return type(self)(self.replies.select(index), self.kept.select(index), before)

    def losses(self) -> Tensor:
        """Mean negative log-likelihood of each reply. Shape ``[requests]``."""
        return self.replies.losses()

    def divergences(self) -> Tensor:
        """How far the answers to keep have moved: mean ``KL(now || before)``, ``[requests]``."""
        logs = _log_probs(self.kept)
        return row_divergences(logs, self.before, _rows(self.kept).to(logs.device), len(self.kept))


def _rows(passes: AnswerPasses) -> Tensor:
    return passes.rows.answer_mask.nonzero(as_tuple=True)[0]


def _log_probs(passes: AnswerPasses) -> Tensor:
    logits = passes.logits()
    return logits.to(compute_dtype(logits.dtype)).log_softmax(-1)
