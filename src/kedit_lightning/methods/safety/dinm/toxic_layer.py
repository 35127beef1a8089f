"""The layer at which a model tells safe replies from unsafe ones: hidden states differ most."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.base_models.taps import stop_after, visiting
from kedit_lightning.edits.projections import compute_dtype

#: How the hidden states of a reply become one.
Pooling: TypeAlias = Literal["mean", "last"]


def pooled(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One hidden state a row, in at least float32: the mean of its tokens, or its last one.

    Args:
        states: Shape ``[rows, tokens, width]``.
        mask: True at the tokens of the replies, at least one a row. Shape ``[rows, tokens]``.
        pooling: Which tokens count.

    Returns:
        Shape ``[rows, width]``.
    """
    states, mask = states.to(compute_dtype(states.dtype)), mask.to(states.device)
    if pooling == "last":
        columns = torch.arange(mask.shape[1], device=mask.device)
        mask = columns == torch.where(mask, columns, -1).amax(1, keepdim=True)
    # Not a product with the mask: what stands on padding may be infinite.
    kept = states.masked_fill(~mask[..., None], 0.0)
    return kept.sum(1) / mask.sum(1, keepdim=True)


def layer_distances(safe: Tensor, unsafe: Tensor, normalised: bool = False) -> Tensor:
    """Euclidean distance of the hidden states of safe and unsafe replies, at each layer.

    Args:
        safe: Those of the safe replies. Shape ``[pairs, layers, width]``.
        unsafe: Those of the unsafe ones, of the same shape.
        normalised: Divide by the root mean square of both, since hidden states grow with depth.

    Returns:
        Shape ``[pairs, layers]``; all 0 where replies are alike.
    """
    distances: Tensor = (safe - unsafe).norm(dim=-1)
    if normalised:
        scale = ((safe.square() + unsafe.square()).mean(-1) / 2).sqrt()
        distances = distances / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return distances


@torch.no_grad()
def reply_states(
    base: BaseModel, rows: Sequence[EncodedRow], layers: Sequence[int], pooling: Pooling
) -> Tensor:
    """Pooled hidden states behind blocks, of the answers of rows, or of whole rows without answers.

    They are what the blocks write, before any final norm. One pass, without the vocabulary.

    Returns:
        Shape ``[rows, layers, width]``.
    """
    padded = base.pad(rows)
    columns = torch.arange(padded.attention_mask.shape[1], device=base.device)
    lengths = padded.answer_mask.sum(1, keepdim=True)
    end = padded.prompt_end[:, None]
    answers = (columns > end) & (columns <= end + lengths)
    mask = torch.where(lengths > 0, answers, padded.attention_mask.bool())
    names = [base.layout.block_name(layer) for layer in layers]
    found: dict[str, Tensor] = {}

    def pool(name: str, x: Tensor, y: Tensor) -> None:
        found[name] = pooled(y, mask, pooling)

    with (
        visiting(base.model, {name: partial(pool, name) for name in names}),
        stop_after(base.model, names[-1]),
    ):
        base.forward(padded)
    return torch.stack([found[name].to(base.device) for name in names], dim=1)


def toxic_layers(
    base: BaseModel,
    safe: Sequence[EncodedRow],
    unsafe: Sequence[EncodedRow],
    layers: Sequence[int],
    pooling: Pooling = "mean",
    normalised: bool = False,
) -> list[int]:
    """The layer of each pair of replies at which their hidden states differ most."""
    states = reply_states(base, [*safe, *unsafe], layers, pooling)
    distances = layer_distances(states[: len(safe)], states[len(safe) :], normalised)
    return [layers[place] for place in distances.argmax(1).tolist()]
