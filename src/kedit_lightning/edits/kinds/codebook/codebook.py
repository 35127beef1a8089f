"""The codebook of GRACE: keys, values and radii (Hartvigsen et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Replacement: TypeAlias = Literal["last", "prompt", "all"]

#: Gap left between two balls after a split, as in the GRACE paper's code.
SPLIT_GAP = 1e-5


@dataclass(frozen=True)
class CodebookEntry:
    """Key and value of one fact.

    Args:
        key: Input of the layer at the last prompt token. Shape ``[d_in]``.
        value: Output that replaces the layer's own. Shape ``[d_out]``.
        label: Token ids of the answer; entries with equal labels merge.
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
        exact = "donot_use_mm_for_euclid_dist"
        smallest = torch.cdist(queries.to(self.keys), self.keys, compute_mode=exact).min(dim=1)
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
        return Codebook(entry.key[None], entry.value[None], radius, (entry.label,)), "new", 0
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
    chosen = (index >= 0)[:, None]
    if where != "all":
        if prompt_end is None:
            return output
        columns = torch.arange(output.shape[1], device=output.device)[None]
        end = prompt_end.to(output.device)[:, None]
        chosen = chosen & (columns == end if where == "last" else columns <= end)
    if not bool(chosen.any()):
        return output
    new = values[index.clamp(min=0)][:, None].to(output.dtype)
    return torch.where(chosen[..., None], new, output)
