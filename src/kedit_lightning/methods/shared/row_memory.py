"""How many rows fit into memory together, with the activations that gradients need."""

from __future__ import annotations

from collections.abc import Sequence

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.memory_budget import memory_budget
from kedit_lightning.base_models.rows import EncodedRow

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
    return max(1, int(memory_budget(base.device) // max(1, widest)))
