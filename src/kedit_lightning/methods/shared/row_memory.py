"""How many rows fit into memory together, with the activations that gradients need."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.rows import EncodedRow

#: Bytes that rows may take on a CPU; on a CUDA device it is half of the free memory.
CPU_BUDGET = 2 << 30
#: Activations that autograd keeps of a block, in widths of the residual stream and of the MLP.
_HIDDEN, _INNER = 12, 4
#: Copies of logits: themselves, log-probabilities, and their gradient.
_LOGITS = 3


def requests_at_a_time(
    base: BaseModel, block: int, encoded: Sequence[Sequence[EncodedRow]], own: int = 0
) -> int:
    """Number of requests whose passes fit into memory together, at least 1.

    Args:
        base: The base model.
        block: First block whose activations are kept.
        encoded: The rows of each request.
        own: Bytes that each request takes besides, for what is trained.
    """
    config = base.model.config.get_text_config(decoder=True)
    hidden, vocabulary = base.layout.hidden_size, int(config.vocab_size)
    inner = getattr(config, "intermediate_size", None)
    width = _HIDDEN * hidden + _INNER * (inner if isinstance(inner, int) else 4 * hidden)
    token = base.dtype.itemsize * (len(base.layout) - block) * width
    place = _LOGITS * vocabulary * max(4, base.dtype.itemsize)

    def size(row: EncodedRow) -> int:
        return (len(row.prompt) + len(row.answer)) * token + max(1, len(row.answer)) * place

    widest = own + max(sum(map(size, rows)) for rows in encoded)
    on_gpu = base.device.type == "cuda"
    budget = torch.cuda.mem_get_info(base.device)[0] // 2 if on_gpu else CPU_BUDGET
    return max(1, int(budget // max(1, widest)))
