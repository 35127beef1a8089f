"""Edits that replace outputs of a layer for the prompts that a codebook recognises (GRACE)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from operator import is_
from typing import ClassVar, TypedDict

import torch
from torch import Tensor

from kedit_lightning.edits.edit import (
    EditableModel,
    MemoryEdit,
    Tensors,
    Values,
    check_finite,
)
from kedit_lightning.edits.effects import Effect, RouteRows, RowFunction, contents_of
from kedit_lightning.edits.kinds.codebook.codebook import (
    Codebook,
    CodebookEntry,
    Replacement,
    build_codebook,
    replace_rows,
)
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.projections import (
    compute_dtype,
    find_module,
    is_projection,
    projection_shape,
)
from kedit_lightning.edits.rounding import state_rounding
from kedit_lightning.edits.row_context import RowContext
from kedit_lightning.edits.state_schema import (
    FULL_PRECISION,
    check_names,
    check_tensor,
    check_value,
)
from kedit_lightning.edits.weight_storage import device_of
from kedit_lightning.errors import EditFileError, UnsupportedUseError

#: Codebooks that are kept: those of a stack with and without the edit that is computed.
_KEPT = 4


class CodebookCache:
    """The last codebooks that were made of edits on one stack; what is added to one is written."""

    def __init__(self) -> None:
        #: Entries of each edit, the device, and their codebook; the last one that was asked for
        #: comes last.
        self._known: list[tuple[list[Sequence[CodebookEntry]], torch.device, Codebook]] = []

    def book(
        self, contents: Sequence[Sequence[CodebookEntry]], device: torch.device, rounding: float
    ) -> Codebook | None:
        """The codebook of edits with these entries, oldest first; ``None`` without any."""
        start, below = 0, None
        for known, where, book in self._known:
            same = len(known) <= len(contents) and where == device and book.rounding == rounding
            if start < len(known) and same and all(map(is_, known, contents)):
                start, below = len(known), book
        new = [entry.to(device) for content in contents[start:] for entry in content]
        found = build_codebook(new, rounding, below)
        if found is not None:
            kept = [one for one in self._known if one[2] is not found][1 - _KEPT :]
            self._known = [*kept, (list(contents), device, found)]
        return found


class _Values(TypedDict):
    module: str
    replacement: Replacement
    labels: list[list[int]]
    radii: list[float]


class CodebookEdit(MemoryEdit):
    """Entries of a codebook at one layer; all such edits of the stack form one codebook.

    It is built from the edits on the stack, in order, so rolling one back also gives its neighbours
    their radii back, and an answer that it had replaced.  ``replacement`` tells which tokens of a
    recognised row get the value.
    """

    kind: ClassVar[str] = "codebook"

    def __init__(
        self,
        base: EditableModel,
        module: str,
        entries: Sequence[CodebookEntry],
        replacement: Replacement = "last",
        origin: EditOrigin | None = None,
    ) -> None:
        super().__init__(base, origin)
        self.module = module
        self.entries = tuple(entries)
        self.replacement = replacement
        #: Codebooks of stacks on which this edit is the lowest of its family.
        self._books = CodebookCache()
        layer = find_module(base.model, module)
        if not any(True for _ in chain(layer.parameters(), layer.buffers())):
            raise UnsupportedUseError(f"a codebook needs a module with weights, not '{module}'")
        shape = projection_shape(layer) if is_projection(layer) else None
        for entry in self.entries:
            if shape and shape != (len(entry.key), len(entry.value)):
                raise EditFileError(
                    f"a codebook entry that maps {len(entry.key)} to {len(entry.value)} values "
                    f"does not fit module '{module}', which maps {shape[0]} to {shape[1]}"
                )
            check_finite("codebook key", module, entry.key)
            check_finite("codebook value", module, entry.value)

    @property
    def family(self) -> tuple[str, str, str]:
        """The codebook that this edit is part of."""
        return self.family_of(self.module, self.replacement)

    @classmethod
    def family_of(cls, module: str, replacement: Replacement) -> tuple[str, str, str]:
        """The codebook that replaces these outputs."""
        return (cls.kind, module, replacement)

    def effects(self) -> Sequence[Effect]:
        """The routing of rows by the codebook that all such edits form."""
        spares = self.replacement == "last"
        return [RouteRows(self.module, self.family, self._build, [self.entries], spares)]

    def _build(self, contents: Sequence[Sequence[CodebookEntry]]) -> RowFunction:
        device = device_of(self.base.model.get_submodule(self.module))
        rounding = state_rounding(self.base.dtype)
        family, where = self.family, self.replacement
        widths = len(self.entries[0].key), len(self.entries[0].value)

        @cache
        def written() -> Codebook:
            # By the first pass that needs it: applying an edit takes no look at those below.
            with torch.inference_mode(False), torch.no_grad():
                book = self._books.book(contents, device, rounding)
            assert book is not None
            return book

        def recall(x: Tensor, y: Tensor, context: RowContext) -> Tensor:
            if (x.shape[-1], y.shape[-1]) != widths:
                raise UnsupportedUseError(
                    f"a codebook that maps {widths[0]} to {widths[1]} values does not fit module "
                    f"'{self.module}', which maps {x.shape[-1]} to {y.shape[-1]}"
                )
            book = written()
            end = context.prompt_end.to(x.device) if context.prefill else None
            if end is not None:
                queries = x[torch.arange(len(x), device=x.device), end]
                context.decisions[family] = book.lookup(queries.to(compute_dtype(x.dtype)))
            if family not in context.decisions:  # applied in the middle of an answer
                return y
            return replace_rows(y, book.values, context.decisions[family], end, where)

        return recall

    def state(self) -> tuple[Tensors, Values]:
        """Keys and values as matrices; labels and radii as plain values."""
        keys, outputs = [e.key for e in self.entries], [e.value for e in self.entries]
        return {"keys": torch.stack(keys), "values": torch.stack(outputs)}, {
            "module": self.module,
            "replacement": self.replacement,
            "labels": [list(entry.label) for entry in self.entries],
            "radii": [entry.radius for entry in self.entries],
        }

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> CodebookEdit:
        """Rebuild the entries."""
        check_value("the codebook", values, _Values)
        check_names("the codebook", tensors, ("keys", "values"))
        count = len(values["labels"])
        if not count == len(values["radii"]) > 0:
            raise EditFileError(f"a codebook of {count} labels and {len(values['radii'])} radii")
        check_tensor("keys", tensors["keys"], (count, None), FULL_PRECISION)
        check_tensor("values", tensors["values"], (count, None))
        labels = [tuple(label) for label in values["labels"]]
        rows = zip(tensors["keys"], tensors["values"], labels, values["radii"], strict=True)
        entries = [CodebookEntry(*row) for row in rows]
        return cls(base, values["module"], entries, values["replacement"], origin)


def stacked_codebook(
    base: EditableModel, family: tuple[str, str, str], device: torch.device
) -> Codebook | None:
    """The codebook that the applied edits of a family form, ``None`` where there are none."""
    routes = [effect for effect in base.edits.effects(RouteRows) if effect.family == family]
    if not routes:
        return None
    lowest: CodebookEdit = routes[0].build.__self__  # type: ignore[attr-defined]
    return lowest._books.book(contents_of(routes), device, state_rounding(base.dtype))
