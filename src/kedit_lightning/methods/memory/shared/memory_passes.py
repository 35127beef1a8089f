"""Forward passes of methods with a memory: states at a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.layer_choice import nearest_layers
from kedit_lightning.base_models.taps import capture, stop_after
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.shared.answer_passes import AnswerPasses

#: Prompts of a forward pass.
_ROWS = 32


class LastStates(NamedTuple):
    """Inputs ``[n, d_in]`` and outputs ``[n, d_out]`` of a layer at the last prompt tokens."""

    inputs: Tensor
    outputs: Tensor


@torch.no_grad()
def last_states(base: BaseModel, module: str, prompts: Sequence[str]) -> LastStates:
    """States of a layer at the last token of each prompt, in at least float32."""
    found: list[LastStates] = []
    dtype = compute_dtype(base.dtype)
    for part in chunks(prompts, _ROWS):
        rows = base.rows(part)
        with capture(base.model, [module]) as seen, stop_after(base.model, module):
            base.forward(rows)
        at = torch.arange(len(part), device=rows.prompt_end.device), rows.prompt_end
        pair = seen.inputs[module][at], seen.outputs[module][at]
        found.append(LastStates(*(states.to(dtype) for states in pair)))
    return LastStates(*(torch.cat(states) for states in zip(*found, strict=True)))


@torch.no_grad()
def last_keys(passes: AnswerPasses, module: str) -> Tensor:
    """Inputs of a layer at the last prompt token of each row, ``[n, d_in]``, at least float32."""
    base, rows = passes.base, passes.rows
    with capture(base.model, [module]) as seen:
        passes.logits()
    states = seen.inputs[module]
    ends = rows.prompt_end.to(states.device)
    at = torch.arange(len(rows), device=states.device)
    return states[at, ends].to(compute_dtype(base.dtype))


def followed_layer(base: BaseModel, depth: float) -> int:
    """The block with a dense MLP nearest to a depth, a share of the blocks, with a block above it.

    Without one above it, later answer tokens could not attend to what a memory changes.
    """
    blocks, dense = len(base.layout), base.layout.dense_layers
    followed = [layer for layer in dense if layer < blocks - 1] or dense
    return nearest_layers(followed, [round(depth * blocks)])[0]
