"""Edits that add a low-rank block to the rows that fall into its clusters."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from kedit_lightning.edits.edit import EditableModel, MemoryEdit, Tensors, Values, check_finite
from kedit_lightning.edits.effects import Effect, RouteRows, RowFunction
from kedit_lightning.edits.kinds.blocks.clusters import BlockEntry, ClusterIndex
from kedit_lightning.edits.low_rank import LowRankBatch, LowRankDelta
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.projections import (
    check_editable,
    compute_dtype,
    find_module,
    projection_shape,
)
from kedit_lightning.edits.prompt_routing import at_columns, put_rows
from kedit_lightning.edits.rounding import state_rounding
from kedit_lightning.edits.row_context import RowContext
from kedit_lightning.edits.state_schema import (
    FULL_PRECISION,
    check_names,
    check_tensor,
    check_value,
)
from kedit_lightning.errors import EditFileError


class _Values(TypedDict):
    key_module: str
    modules: list[str]
    labels: list[list[int]]
    radii: list[float]
    blocks: list[int]


class Routes(NamedTuple):
    """What one edit adds to the routing: its facts, and how many blocks it has."""

    entries: tuple[BlockEntry, ...]
    blocks: int


class BlocksEdit(MemoryEdit):
    """Low-rank blocks beside some projections, and the facts that lead to them.

    The facts of all such edits on the stack form clusters, in the order of the stack.  A row whose
    prompt falls into one gets the block of its nearest fact, with all of its tokens; other rows
    pass bit for bit.

    Args:
        base: The base model.
        key_module: Module whose output at the last prompt token is compared; it runs before those
            that are changed.
        blocks: For each changed projection the factors of all blocks: ``a`` of shape
            ``[blocks, rank, d_in]`` and ``b`` of shape ``[blocks, d_out, rank]``.
        entries: The facts.
        origin: Where the edit comes from.
    """

    kind: ClassVar[str] = "blocks"

    def __init__(
        self,
        base: EditableModel,
        key_module: str,
        blocks: Mapping[str, LowRankDelta],
        entries: Sequence[BlockEntry],
        origin: EditOrigin | None = None,
    ) -> None:
        super().__init__(base, origin)
        self.key_module, self.blocks = key_module, dict(blocks)
        self.entries = tuple(entries)
        find_module(base.model, key_module)
        self.count = len(next(iter(self.blocks.values())).a)
        for module, factors in self.blocks.items():
            d_in, d_out = projection_shape(check_editable(base.model, module))
            rank = factors.a.shape[1]
            for name, shape in (("a", (self.count, rank, d_in)), ("b", (self.count, d_out, rank))):
                tensor: Tensor = getattr(factors, name)
                check_tensor(f"{name} of '{module}'", tensor, shape, FULL_PRECISION)
                check_finite(f"block's {name}", module, tensor)
        for entry in self.entries:
            check_finite("block's key", key_module, entry.key)
            if not 0 <= entry.block < self.count:
                raise EditFileError(f"block {entry.block} of an edit that has {self.count}")

    @property
    def family(self) -> Hashable:
        """The routing that this edit is part of."""
        return self.family_of(self.key_module, self.blocks)

    @classmethod
    def family_of(cls, key_module: str, modules: Iterable[str]) -> Hashable:
        """The routing by the output of one module to blocks of others."""
        return (cls.kind, key_module, *modules)

    def effects(self) -> Sequence[Effect]:
        """The routing at the key module, and the blocks at the changed ones."""
        routes = Routes(self.entries, self.count)
        route = RouteRows(self.key_module, self.family, self._router, [routes])
        changes = [
            RouteRows(module, self.family, self._changer, [factors])
            for module, factors in self.blocks.items()
        ]
        return [route, *changes]

    def _router(self, contents: Sequence[Routes]) -> RowFunction:
        entries, first = list[BlockEntry](), 0
        for routes in contents:
            entries += [replace(entry, block=entry.block + first) for entry in routes.entries]
            first += routes.blocks
        table = ClusterIndex.of(entries, state_rounding(self.base.dtype)).table()

        def route(x: Tensor, y: Tensor, context: RowContext) -> Tensor:
            if context.prefill:
                queries = at_columns(y, context.prompt_end)
                context.decisions[self.family] = table.on(y.device).lookup(queries)
            return y

        return route

    def _changer(self, contents: Sequence[LowRankDelta]) -> RowFunction:
        rank = max(factors.a.shape[1] for factors in contents)
        a = torch.cat([F.pad(d.a, (0, 0, 0, rank - d.a.shape[1])) for d in contents])
        b = torch.cat([F.pad(d.b, (0, rank - d.b.shape[2])) for d in contents])
        blocks = LowRankDelta(a, b)

        def change(x: Tensor, y: Tensor, context: RowContext) -> Tensor:
            decided = context.decisions.get(self.family)
            if decided is None:  # applied in the middle of an answer
                return y
            rows = (decided >= 0).nonzero()[:, 0].to(y.device)
            if not len(rows):
                return y
            dtype = compute_dtype(y.dtype)
            batch = LowRankBatch(blocks.to(x.device), decided.to(x.device)[rows])
            changed = y[rows].to(dtype) + batch.change(x[rows].to(dtype))
            return put_rows(y, rows, changed, None)

        return change

    def state(self) -> tuple[Tensors, Values]:
        """Keys as a matrix, factors by the number of their module, and plain values."""
        tensors = {"keys": torch.stack([entry.key for entry in self.entries])}
        for number, factors in enumerate(self.blocks.values()):
            tensors |= {f"{number}.a": factors.a, f"{number}.b": factors.b}
        return tensors, {
            "key_module": self.key_module,
            "modules": list(self.blocks),
            "labels": [list(entry.label) for entry in self.entries],
            "radii": [entry.radius for entry in self.entries],
            "blocks": [entry.block for entry in self.entries],
        }

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> BlocksEdit:
        """Rebuild the blocks and the facts."""
        check_value("the edit", values, _Values)
        modules, labels = values["modules"], values["labels"]
        names = [f"{number}.{part}" for number in range(len(modules)) for part in "ab"]
        check_names("the edit", tensors, ["keys", *names])
        lengths = {len(values[name]) for name in ("labels", "radii", "blocks")}
        if lengths != {len(labels)} or not labels or not modules:
            raise EditFileError(f"blocks for {len(modules)} modules and {sorted(lengths)} facts")
        check_tensor("keys", tensors["keys"], (len(labels), None), FULL_PRECISION)
        blocks = {}
        for number, module in enumerate(modules):
            pair = LowRankDelta(tensors[f"{number}.a"], tensors[f"{number}.b"])
            for part, tensor in zip("ab", pair, strict=True):
                check_tensor(f"{number}.{part}", tensor, (None, None, None), FULL_PRECISION)
            blocks[module] = pair
        columns = (map(tuple, labels), values["radii"], values["blocks"])
        rows = zip(tensors["keys"], *columns, strict=True)
        entries = [BlockEntry(*row) for row in rows]
        return cls(base, values["key_module"], blocks, entries, origin)
