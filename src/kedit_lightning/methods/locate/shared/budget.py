"""Memory budget of target optimisation: requests whose activations fit into memory together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kedit_lightning.base_models import BaseModel, EncodedRow
from kedit_lightning.edits.projections import projection_shape

#: Bytes that a pass may keep on a CPU; on a CUDA device it is half of the free memory.
CPU_BUDGET = 2 << 30
#: Activations that autograd keeps of a block, in widths of the residual stream and of the MLP.
_HIDDEN, _INNER = 12, 4
#: Copies of logits: themselves, log-probabilities, and their gradient.
_LOGITS = 3


def requests_at_a_time(base: BaseModel, block: int, encoded: Sequence[Sequence[EncodedRow]]) -> int:
    """Number of requests whose rows fit into the budget together; at least one.

    Args:
        base: The base model.
        block: First block that runs.
        encoded: Rows of each request.
    """
    inner = projection_shape(base.module(base.layout.block(0).down))[0]
    width = _HIDDEN * base.layout.hidden_size + _INNER * inner
    token = base.dtype.itemsize * (len(base.layout) - block) * width
    vocabulary = int(base.model.config.get_text_config(decoder=True).vocab_size)
    place = _LOGITS * vocabulary * max(4, base.dtype.itemsize)
    widest = max(
        sum(
            (len(row.prompt) + len(row.answer)) * token + max(1, len(row.answer)) * place
            for row in rows
        )
        for rows in encoded
    )
    budget = CPU_BUDGET
    if base.device.type == "cuda":
        budget = torch.cuda.mem_get_info(base.device)[0] // 2
    return max(1, budget // max(1, widest))
