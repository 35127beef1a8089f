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


def token_bytes(base: BaseModel, block: int) -> int:
    """Bytes of the activations that gradients need of a token, from a block on."""
    config = base.model.config.get_text_config(decoder=True)
    hidden, inner = base.layout.hidden_size, getattr(config, "intermediate_size", None)
    width = _HIDDEN * hidden + _INNER * (inner if isinstance(inner, int) else 4 * hidden)
    return base.dtype.itemsize * (len(base.layout) - block) * width


def place_bytes(base: BaseModel) -> int:
    """Bytes of the logits of one place, with all that a loss makes of them."""
    config = base.model.config.get_text_config(decoder=True)
    return _LOGITS * int(config.vocab_size) * max(4, base.dtype.itemsize)


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
    token, place = token_bytes(base, block), place_bytes(base)

    def size(row: EncodedRow) -> int:
        return (len(row.prompt) + len(row.answer)) * token + max(1, len(row.answer)) * place

    widest = own + max(sum(map(size, rows)) for rows in encoded)
    return max(1, int(memory_budget(base.device) // max(1, widest)))
