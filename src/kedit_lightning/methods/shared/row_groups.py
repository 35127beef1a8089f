"""Which requests are optimised together: those of about equal length, as far as memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.batching import cheapest_parts
from kedit_lightning.base_models.continuation import can_resume
from kedit_lightning.base_models.memory_budget import memory_budget
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.methods.shared.row_memory import place_bytes, token_bytes

#: What a pass costs beside its tokens, in tokens.
OVERHEAD = 64
#: A group may take this share of the memory of the weights, ...
_SHARE = 0.35
#: ... and in small models this many bytes.
_LEAST = 256 << 20


@dataclass(frozen=True)
class PassSize:
    """What the passes of a request take.

    Args:
        rows: Number of rows.
        width: Tokens that run in each pass, of its longest row.
        head: Tokens before them, of the longest row.
        places: Number of places whose logits are read.
    """

    rows: int
    width: int
    head: int
    places: int

    @classmethod
    def of(cls, rows: Sequence[EncodedRow], resumed: bool) -> PassSize:
        """That of a request's rows, which start at the last token of the subject if resumed."""
        cuts = [row.subject_end if resumed else 0 for row in rows]
        pairs = list(zip(rows, cuts, strict=True))
        width = max(len(row.prompt) - at + max(0, len(row.answer) - 1) for row, at in pairs)
        places = sum(max(1, len(row.answer)) for row in rows)
        return cls(len(rows), width, max(cuts), places)


def partition(
    sizes: Sequence[PassSize], token: int, head: int, place: int, budget: int
) -> list[list[int]]:
    """Groups of requests with the least padding, whose passes fit into a budget each.

    The cost of a group is the number of its padded tokens and :data:`OVERHEAD`.

    Args:
        sizes: What the passes of each request take.
        token: Bytes of a token that runs.
        head: Bytes of a token before those.
        place: Bytes of a place whose logits are read.
        budget: Bytes that a group may take; one request may take more.

    Returns:
        The numbers of the requests of each group, shortest first.
    """
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i].width, sizes[i].head, i))

    def costs(end: int) -> Iterator[int]:
        width = sizes[order[end - 1]].width
        rows = places = longest = 0
        for number in reversed(order[:end]):
            one = sizes[number]
            rows, places, longest = rows + one.rows, places + one.places, max(longest, one.head)
            taken = rows * (width * token + (width + longest) * head) + places * place
            if taken > budget and number != order[end - 1]:
                return
            yield OVERHEAD + rows * width

    return [order[part] for part in cheapest_parts(len(order), costs)]


def request_groups(
    base: BaseModel, block: int, encoded: Sequence[Sequence[EncodedRow]]
) -> list[list[int]]:
    """Numbers of the requests of each group whose values are found together.

    Args:
        base: The base model.
        block: First block that runs in each pass.
        encoded: The rows of each request.
    """
    resumed = can_resume(base) and not any(row.images for rows in encoded for row in rows)
    weights = sum(weight.nbytes for weight in base.model.parameters())
    budget = min(memory_budget(base.device), max(_LEAST, int(_SHARE * weights)))
    sizes = [PassSize.of(rows, resumed) for rows in encoded]
    # Keys and values of earlier tokens, and the copies of them that gradients need.
    head = 4 * base.layout.hidden_size * base.dtype.itemsize * len(base.layout)
    return partition(sizes, token_bytes(base, block), head, place_bytes(base), budget)
