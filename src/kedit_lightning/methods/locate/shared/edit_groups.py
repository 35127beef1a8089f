"""Groups of requests whose edits are solved together and stay independent of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import CompositeEdit, DenseEdit, Edit, EditOrigin, LowRankEdit
from kedit_lightning.requests import EditRequest


class EditGroups:
    """Collects the changes of each group, layer by layer.

    Args:
        base: The base model, as its stack stands.
        groups: The requests of each edit.
    """

    def __init__(self, base: BaseModel, groups: Sequence[Sequence[EditRequest]]) -> None:
        self.base, self.groups = base, groups
        self.requests = [request for group in groups for request in group]
        ends = accumulate(len(group) for group in groups)
        #: Places of each group among the requests.
        self.parts = [slice(end - len(g), end) for g, end in zip(groups, ends, strict=True)]
        self.changes: list[list[Edit]] = [[] for _ in groups]
        self.memories: list[dict[str, Tensor]] = [{} for _ in groups]

    @contextmanager
    def in_force(self) -> Iterator[list[Edit | None] | None]:
        """Apply the changes so far: of one group to all rows, of several to the rows of each.

        Gives the edit that each request must carry, or ``None`` where all rows have the same.
        """
        edits = [CompositeEdit(self.base, parts) if parts else None for parts in self.changes]
        if len(edits) > 1 and any(edits):
            yield [e for e, group in zip(edits, self.groups, strict=True) for _ in group]
            return
        with self.base.edits.restored():
            if edits[0] is not None:
                edits[0].apply()
            yield None

    def remember(self, name: str, values: Tensor) -> None:
        """Put values of all requests, ``[..., n]``, into the memories of their edits."""
        for memory, part in zip(self.memories, self.parts, strict=True):
            memory[name] = values[..., part].contiguous()

    def edits(self, origin: Callable[[Sequence[EditRequest]], EditOrigin]) -> list[Edit]:
        """One edit for each group, with what later edits must know."""
        numbered = enumerate(self.groups)
        return [self._joined(number, origin(requests)) for number, requests in numbered]

    def _joined(self, number: int, origin: EditOrigin) -> Edit:
        changes, memory = self.changes[number], self.memories[number]
        low_rank = [edit.factors for edit in changes if isinstance(edit, LowRankEdit)]
        dense = [edit.changes for edit in changes if isinstance(edit, DenseEdit)]
        factors = {name: delta for by_module in low_rank for name, delta in by_module.items()}
        if not dense:
            return LowRankEdit(self.base, factors, origin, memory)
        whole = DenseEdit(
            self.base, {n: c for by_module in dense for n, c in by_module.items()}, origin
        )
        if not memory:
            return whole
        remembered = LowRankEdit(self.base, {}, origin, memory)
        return CompositeEdit(self.base, [remembered, whole], origin)
