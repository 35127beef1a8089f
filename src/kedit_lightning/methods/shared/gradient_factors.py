"""The gradient of a weight as thin factors: inputs and output gradients of projections.

For a projection ``y = W x`` the gradient of a loss with respect to ``W`` is ``Σ_t δ_t x_tᵀ``, with
``δ_t`` the gradient with respect to ``y_t``.  The factors are read through zeros added to the
outputs, so that no gradient of the size of a weight is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, TokenRows
from kedit_lightning.base_models.taps import zero_leaves
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.shared.losses import check_reached, mean_nll


@dataclass(frozen=True)
class Factors:
    """Factors of the gradient of one weight, over the tokens of several rows.

    Args:
        inputs: What the projection received. Shape ``[tokens, d_in]``.
        gradients: Gradient of the loss with respect to its output. Shape ``[tokens, d_out]``.
        rows: Row that each token belongs to. Shape ``[tokens]``.
    """

    inputs: Tensor
    gradients: Tensor
    rows: Tensor

    def to(self, device: torch.device | str) -> Factors:
        """The same on another device."""
        return Factors(self.inputs.to(device), self.gradients.to(device), self.rows.to(device))

    def of_rows(self, first: int, last: int) -> Factors:
        """The tokens of rows ``first`` to ``last - 1``, with rows counted from ``first``."""
        kept = (self.rows >= first) & (self.rows < last)
        return Factors(self.inputs[kept], self.gradients[kept], self.rows[kept] - first)


def answer_loss(base: BaseModel, rows: TokenRows) -> Tensor:
    """Negative log-likelihood of each row's answer, averaged over its tokens. Shape ``[batch]``."""
    return mean_nll(base.answer_log_probs(rows), rows.answer_mask)


def predicting(rows: TokenRows) -> Tensor:
    """Columns whose logits predict an answer token. Shape ``[batch, tokens]``, boolean."""
    at = torch.zeros_like(rows.attention_mask, dtype=torch.bool)
    row = torch.arange(len(rows), device=at.device)[:, None].expand_as(rows.answer_columns)
    at[row[rows.answer_mask], rows.answer_columns[rows.answer_mask]] = True
    return at


def capture_factors(
    base: BaseModel, rows: TokenRows, names: Sequence[str], at: Tensor | None = None
) -> dict[str, Factors]:
    """Factors of the gradient of the rows' answer losses, by projection.

    The losses of the rows are added up, so what one row gives does not depend on the others. Edits
    on the stack are in force. Unless tokens are chosen by ``at``, ``[batch, tokens]``, those that
    add nothing to the gradient, padding among them, are left out.

    Returns:
        Factors in at least float32, without autograd history.
    """
    with torch.enable_grad(), zero_leaves(base.model, names) as (seen, leaves):
        loss = answer_loss(base, rows).sum()
        inputs = {name: seen.inputs[name] for name in names}
        check_reached(loss)
        gradients = torch.autograd.grad(loss, [leaves[name] for name in names])
    return {
        name: _flatten(inputs[name], gradient, at)
        for name, gradient in zip(names, gradients, strict=True)
    }


def _flatten(inputs: Tensor, gradients: Tensor, at: Tensor | None) -> Factors:
    if at is None:
        at = (gradients != 0).any(-1) & (inputs != 0).any(-1)
    at = at.to(gradients.device)  # a device map may have put the projection elsewhere
    dtype = compute_dtype(gradients.dtype)
    rows = at.nonzero()[:, 0]
    return Factors(inputs[at].to(dtype), gradients[at].to(dtype), rows)
