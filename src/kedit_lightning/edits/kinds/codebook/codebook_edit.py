"""Edits that keep a memory beside the model and act on the rows it recognises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.edits.edit import Edit, EditableModel, EditOrigin, check_finite
from kedit_lightning.edits.effects import MemoryPatch, Patch, RowFunction
from kedit_lightning.edits.projections import (
    compute_dtype,
    find_module,
    is_projection,
    projection_shape,
)
from kedit_lightning.edits.row_context import RowContext
from kedit_lightning.errors import EditFileError

Replacement: TypeAlias = Literal["last", "prompt", "all"]

#: Gap left between two balls after a split, as in the GRACE paper's code.
SPLIT_GAP = 1e-5


class MemoryEdit(Edit):
    """An edit that decides row by row, at the last prompt token, whether it acts."""


@dataclass(frozen=True)
class CodebookEntry:
    """What one fact writes into a codebook.

    Args:
        key: Input of the layer at the last prompt token. Shape ``[d_in]``.
        value: Output that replaces the layer's own. Shape ``[d_out]``.
        label: Token ids of the answer, by which equal answers are told.
        radius: Distance within which a new key is recognised, in units of the layer's input.
    """

    key: Tensor
    value: Tensor
    label: tuple[int, ...]
    radius: float

    def to(self, device: torch.device) -> CodebookEntry:
        """The same entry with its tensors on a device."""
        return CodebookEntry(self.key.to(device), self.value.to(device), self.label, self.radius)


@dataclass(frozen=True)
class Codebook:
    """Keys ``[n, d_in]``, values ``[n, d_out]``, radii ``[n]``, and the labels of the entries."""

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: tuple[tuple[int, ...], ...]

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to, and index of, the nearest key. Shapes ``[batch]`` from ``[batch, d_in]``."""
        # The matrix-product form of the distance loses digits that small radii need.
        distances = torch.cdist(
            queries.to(self.keys), self.keys, compute_mode="donot_use_mm_for_euclid_dist"
        )
        smallest = distances.min(dim=1)
        return smallest.values, smallest.indices

    def lookup(self, queries: Tensor) -> Tensor:
        """Index of the entry that recognises each query, ``-1`` where none does. ``[batch]``."""
        distance, index = self.nearest(queries)
        return torch.where(distance <= self.radii[index], index, -1)


def write_entry(book: Codebook | None, entry: CodebookEntry) -> tuple[Codebook, str, int]:
    """Add an entry by GRACE's rules (Hartvigsen et al. 2023, algorithm 1).

    Returns:
        The new codebook, which rule applied (``new``, ``split`` or ``expand``), and the index of
        the entry that now answers for the key.
    """
    radius = torch.tensor([entry.radius], dtype=entry.key.dtype, device=entry.key.device)
    if book is None:
        fresh = Codebook(entry.key[None], entry.value[None], radius, (entry.label,))
        return fresh, "new", 0
    distance, index = (t[0] for t in book.nearest(entry.key[None]))
    nearest = int(index)
    radii = book.radii.clone()
    if distance <= entry.radius + radii[nearest] and book.labels[nearest] == entry.label:
        radii[nearest] = torch.maximum(radii[nearest], distance)
        values = book.values.clone()
        values[nearest] = entry.value
        return Codebook(book.keys, values, radii, book.labels), "expand", nearest
    rule = "new"
    if distance <= entry.radius + radii[nearest]:
        rule, radius = "split", (distance / 2)[None]
        radii[nearest] = distance / 2 - SPLIT_GAP
    grown = Codebook(
        torch.cat([book.keys, entry.key[None]]),
        torch.cat([book.values, entry.value[None]]),
        torch.cat([radii, radius]),
        (*book.labels, entry.label),
    )
    return grown, rule, len(grown.labels) - 1


def build_codebook(entries: Sequence[CodebookEntry]) -> Codebook | None:
    """The codebook that entries make when they are written one after another."""
    book: Codebook | None = None
    for entry in entries:
        book, _, _ = write_entry(book, entry)
    return book


def stacked_codebook(
    edits: Iterable[Edit], family: tuple[str, str, str], device: torch.device
) -> Codebook | None:
    """The codebook that the edits of one family make, ``None`` where there are none."""
    parts = [part for edit in edits for part in edit.parts()]
    return build_codebook(
        [
            entry.to(device)
            for part in parts
            if isinstance(part, CodebookEdit) and part.family == family
            for entry in part.entries
        ]
    )


def replace_rows(
    output: Tensor, values: Tensor, index: Tensor, prompt_end: Tensor | None, where: Replacement
) -> Tensor:
    """Put values into the recognised rows of a layer's output.

    Args:
        output: Shape ``[batch, tokens, d_out]``.
        values: Shape ``[n, d_out]``.
        index: Entry of each row, ``-1`` for rows that stay as they are. Shape ``[batch]``.
        prompt_end: Column of the last prompt token; ``None`` in decode steps.
        where: The last prompt token, the prompt up to it, or every token.
    """
    hit = index >= 0
    columns = torch.arange(output.shape[1], device=output.device)[None]
    if where == "all":
        chosen = torch.ones_like(columns, dtype=torch.bool).expand(output.shape[:2])
    elif prompt_end is None:
        return output
    else:
        end = prompt_end.to(output.device)[:, None]
        chosen = columns == end if where == "last" else columns <= end
    if not bool(hit.any()):
        return output
    chosen = chosen & hit[:, None]
    new = values[index.clamp(min=0)][:, None].to(output.dtype)
    return torch.where(chosen[..., None], new, output)


class CodebookEdit(MemoryEdit):
    """Entries of a codebook at one layer; all such edits of the stack form one codebook.

    The codebook is built from the edits on the stack, in order, so rolling one back also gives its
    neighbours their radii back.

    Args:
        base: The base model.
        module: Name of the layer.
        entries: What is written.
        replacement: Which tokens of a recognised row get the value.
        origin: Where the edit comes from.
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
        owner = find_module(base.model, module)
        for entry in self.entries:
            shapes = (len(entry.key), len(entry.value))
            if is_projection(owner) and shapes != projection_shape(owner):
                raise EditFileError(
                    f"a codebook entry that maps {shapes[0]} to {shapes[1]} values does not fit "
                    f"module '{module}', which maps {projection_shape(owner)[0]} to "
                    f"{projection_shape(owner)[1]}"
                )
            check_finite("codebook key", module, entry.key)
            check_finite("codebook value", module, entry.value)

    @property
    def family(self) -> tuple[str, str, str]:
        """What edits must share to form one codebook."""
        return self.family_of(self.module, self.replacement)

    @classmethod
    def family_of(cls, module: str, replacement: Replacement) -> tuple[str, str, str]:
        """What all edits that replace these outputs share."""
        return (cls.kind, module, replacement)

    def patches(self) -> dict[str, Patch]:
        """The entries, for the codebook of the layer."""
        return {self.module: MemoryPatch(self.family, self._build, self.entries)}

    def _build(self, contents: Sequence[Sequence[CodebookEntry]]) -> RowFunction:
        parameter = next(self.base.model.get_submodule(self.module).parameters())
        book = build_codebook([e.to(parameter.device) for content in contents for e in content])
        assert book is not None
        family, where = self.family, self.replacement

        def recall(x: Tensor, y: Tensor, context: RowContext) -> Tensor:
            if context.prefill:
                end = context.prompt_end.to(x.device)
                queries = x[torch.arange(len(x), device=x.device), end]
                context.decisions[family] = book.lookup(queries.to(compute_dtype(x.dtype)))
                return replace_rows(y, book.values, context.decisions[family], end, where)
            if family not in context.decisions:  # applied in the middle of an answer
                return y
            return replace_rows(y, book.values, context.decisions[family], None, where)

        return recall

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Keys and values as matrices; labels and radii as plain values."""
        tensors = {
            "keys": torch.stack([entry.key for entry in self.entries]),
            "values": torch.stack([entry.value for entry in self.entries]),
        }
        return tensors, {
            "module": self.module,
            "replacement": self.replacement,
            "labels": [list(entry.label) for entry in self.entries],
            "radii": [entry.radius for entry in self.entries],
        }

    @classmethod
    def from_state(
        cls,
        base: EditableModel,
        origin: EditOrigin,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
    ) -> CodebookEdit:
        """Rebuild the entries."""
        entries = [
            CodebookEntry(key, value, tuple(label), radius)
            for key, value, label, radius in zip(
                tensors["keys"], tensors["values"], values["labels"], values["radii"], strict=True
            )
        ]
        return cls(base, values["module"], entries, values["replacement"], origin)
