"""Weights that are no numbers."""

from __future__ import annotations

import torch
from torch import nn

from kedit_lightning.edits.weight_storage import stored_tensors
from kedit_lightning.errors import NonFiniteError


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
