"""Weights that are no numbers, and passes that would give none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.edits.weight_storage import stored_tensors
from kedit_lightning.errors import NonFiniteError, UnsupportedUseError


def check_finite_weights(model: nn.Module, label: str) -> None:
    """Check that all weights of a model, called ``label`` in messages, are finite.

    Raises:
        NonFiniteError: A weight is NaN or infinite; the message names the tensor.
    """
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in stored_tensors(model):
        if name in buffers or not tensor.is_floating_point():
            continue
        # torch has no such test for numbers of eight bits
        values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                f"the weights of base model '{label}' hold NaN or infinite values in "
                f"'{name}', so nothing computed from them would mean anything; load the model "
                "again, in bfloat16 or float32 if it was converted to float16"
            )


def checked_lengths(model: nn.Module, label: str, rows: Sequence[EncodedRow]) -> set[int]:
    """Numbers of tokens of rows, which give numbers when they are padded behind their tokens.

    What transformers' own attention (``eager``) adds for a hidden token is the smallest number of
    the model's dtype, and its softmax is in float32, where that of float64 is minus infinity.  So a
    token of padding whose window holds nothing but padding becomes NaN, and then all that follows.

    Raises:
        UnsupportedUseError: The padding of a row exceeds the window; the message names both.
    """
    lengths = {len(row.prompt) + len(row.answer) for row in rows}
    if len(lengths) < 2 or getattr(model, "dtype", None) is not torch.float64:
        return lengths
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    window, gap = getattr(text, "sliding_window", None), max(lengths) - min(lengths)
    if window and gap >= window and text._attn_implementation == "eager":
        raise UnsupportedUseError(
            f"a row would have {gap} tokens of padding, and base model '{label}' has attention "
            f"that sees {window}: in float64 the attention 'eager' of transformers then gives NaN; "
            "load it in float32, or with attn_implementation sdpa where it has that"
        )
    return lengths
