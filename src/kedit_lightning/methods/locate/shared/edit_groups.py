"""Groups of requests whose edits are solved together and stay independent of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import CompositeEdit, DenseEdit, Edit, EditOrigin, LowRankEdit
from kedit_lightning.edits.effects import AddToOutput, of_type
from kedit_lightning.methods.locate.shared.subject_states import Carried
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
    def in_force(self) -> Iterator[Carried]:
        """Apply the changes so far: of one group to all rows, of several to the rows of each."""
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
        parts = zip(self.groups, self.changes, self.memories, strict=True)
        return [self._joined(edits, origin(group), memory) for group, edits, memory in parts]

    def _joined(self, edits: list[Edit], origin: EditOrigin, memory: dict[str, Tensor]) -> Edit:
        effects = [effect for edit in edits for effect in edit.effects()]
        changes = {change.module: change.delta for change in of_type(effects, AddToOutput)}
        factors = {k: d.low_rank for k, d in changes.items() if d.low_rank is not None}
        dense = {k: (d.dense, d.bias) for k, d in changes.items() if d.low_rank is None}
        low_rank = LowRankEdit(self.base, factors, origin, memory)
        if not dense:
            return low_rank
        whole = DenseEdit(self.base, dense, origin)
        return CompositeEdit(self.base, [low_rank, whole], origin) if memory else whole
