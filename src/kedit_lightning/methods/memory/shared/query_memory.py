"""Inputs of an MLP on which patches shall be silent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.rows import EncodedRow, TokenRows
from kedit_lightning.base_models.taps import capture, stop_after
from kedit_lightning.edits.projections import compute_dtype, projection_shape
from kedit_lightning.requests import EditRequest
from kedit_lightning.statistics import few_sample_texts

#: Rows of a forward pass.
_ROWS = 32


@torch.no_grad()
def _inputs(
    base: BaseModel, module: str, encoded: Sequence[EncodedRow]
) -> Iterator[tuple[TokenRows, Tensor]]:
    """Rows, a few at a time, and the inputs of a module, ``[batch, tokens, d]``."""
    for start in range(0, len(encoded), _ROWS):
        rows = base.pad(encoded[start : start + _ROWS])
        with capture(base.model, [module]) as seen, stop_after(base.model, module):
            base.forward(rows)
        yield rows, seen.inputs[module].to(compute_dtype(base.dtype))


def text_queries(base: BaseModel, module: str) -> Tensor:
    """Inputs of a module at all tokens of the small packaged text. Shape ``[tokens, d]``."""
    texts = [base.encoder.text(text).prompt[: base.max_tokens] for text in few_sample_texts()]
    passes = _inputs(base, module, [EncodedRow(text, ()) for text in texts])
    return torch.cat([inputs[rows.attention_mask.bool()] for rows, inputs in passes])


def irrelevant_queries(
    base: BaseModel,
    module: str,
    requests: Sequence[EditRequest],
    prompts: Sequence[Sequence[str]],
) -> tuple[Tensor, Tensor]:
    """Inputs of a module where the answers of requests would follow prompts of others.

    Args:
        base: The base model, as its stack stands.
        module: Name of the module.
        requests: The requests.
        prompts: The prompts for each of them.

    Returns:
        The inputs, ``[n, d]``, and the number of the request that each belongs to, ``[n]``.
    """
    encoded = [
        base.encode(prompt, request.target_new)
        for request, own in zip(requests, prompts, strict=True)
        for prompt in own
    ]
    counts = torch.tensor([len(row.answer) for row in encoded], dtype=torch.long)
    number = torch.tensor([i for i, own in enumerate(prompts) for _ in own], dtype=torch.long)
    width, dtype = projection_shape(base.module(module))[0], compute_dtype(base.dtype)
    found = [torch.zeros(0, width, dtype=dtype, device=base.device)]
    for rows, inputs in _inputs(base, module, encoded):
        row, slot = rows.answer_mask.nonzero(as_tuple=True)
        found.append(inputs[row, rows.answer_columns[row, slot]])
    queries = torch.cat(found)
    return queries, number.repeat_interleave(counts).to(queries.device)
