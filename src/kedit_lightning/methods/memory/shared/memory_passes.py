"""Forward passes of methods with a memory: states at a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.layer_choice import nearest_layers
from kedit_lightning.base_models.taps import capture, stop_after
from kedit_lightning.chat_turns import put_before
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.shared.answer_passes import AnswerPasses
from kedit_lightning.methods.shared.contexts import contexts_of
from kedit_lightning.requests import EditRequest

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


class PromptPasses:
    """Repeated passes of requests, by themselves and behind contexts, while one layer changes.

    Args:
        base: The base model, as its stack stands.
        requests: The requests.
        contexts: Texts that stand before each prompt.
        module: The layer; it changes from the last prompt token on.
    """

    def __init__(
        self,
        base: BaseModel,
        requests: Sequence[EditRequest],
        contexts: Sequence[str],
        module: str,
    ) -> None:
        rows = [
            base.encode(
                put_before(context, request.prompt), request.target_new, image=request.image
            )
            for request in requests
            for context in contexts_of(base, request, contexts)
        ]
        self._passes = AnswerPasses(base, rows, [module], "prompt_end")
        keys = last_keys(self._passes, module)
        #: Inputs of the layer at the last prompt tokens, bare prompts first, ``[n, rows, d_in]``.
        self.keys = keys.reshape(len(requests), -1, keys.shape[-1])

    def step(self, number: int) -> tuple[AnswerPasses, Tensor]:
        """Passes of each request's bare row and one of its others, another in each step.

        Also gives the request of each row.
        """
        requests, rows = self.keys.shape[:2]
        index = step_rows(requests, rows, number).to(self.keys.device)
        return self._passes.select(index), index // rows


def step_rows(requests: int, rows: int, step: int) -> Tensor:
    """Rows of a step: each request's first, and one of its others, another in each step.

    Args:
        requests: Number of requests.
        rows: Rows of each; they stand one after another.
        step: Number of the step.
    """
    first = torch.arange(requests) * rows
    if rows == 1:
        return first
    return torch.cat([first, first + 1 + (torch.arange(requests) + step) % (rows - 1)])


def followed_layer(base: BaseModel, depth: float) -> int:
    """The block with a dense MLP nearest to a depth, a share of the blocks, with a block above it.

    Without one above it, later answer tokens could not attend to what a memory changes.
    """
    blocks, dense = len(base.layout), base.layout.dense_layers
    followed = [layer for layer in dense if layer < blocks - 1] or dense
    return nearest_layers(followed, [round(depth * blocks)])[0]
