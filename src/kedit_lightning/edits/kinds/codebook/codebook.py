"""The codebook of GRACE: keys, values and radii (Hartvigsen et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.edits.rounding import indistinct

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
    """Keys ``[n, d_in]``, values ``[n, d_out]``, radii ``[n]``, and the labels of the entries.

    ``rounding`` is the distance, relative to its norm, within which a key is itself.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: tuple[tuple[int, ...], ...]
    rounding: float = 0.0

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to, and index of, the nearest key. Shapes ``[batch]`` from ``[batch, d_in]``."""
        # The matrix-product form of the distance loses digits that small radii need.
        exact = "donot_use_mm_for_euclid_dist"
        smallest = torch.cdist(queries.to(self.keys), self.keys, compute_mode=exact).min(dim=1)
        return smallest.values, smallest.indices

    def lookup(self, queries: Tensor) -> Tensor:
        """Index of the entry that recognises each query, ``-1`` where none does. ``[batch]``."""
        distance, index = self.nearest(queries)
        found = distance <= self.radii[index]
        # Whatever its radius: the prompt of an entry is recognised in a padded batch too.
        found = found | indistinct(distance, self.keys[index], self.rounding)
        return torch.where(found, index, -1)


def write_entry(
    book: Codebook | None, entry: CodebookEntry, rounding: float = 0.0
) -> tuple[Codebook, str, int]:
    """Add an entry by GRACE's rules (Hartvigsen et al. 2023, algorithm 1), with one beside them.

    The algorithm splits the balls of different answers, also where their keys are equal: neither
    ball is left.  Here the new entry then takes the place of the old one, with a radius that is no
    larger than that of either.

    Args:
        book: The codebook so far.
        entry: The entry to add.
        rounding: Relative distance within which keys are equal, for a codebook that begins.

    Returns:
        The new codebook, which rule applied (``new``, ``split``, ``expand`` or ``replace``), and
        the index of the entry that now answers for the key.
    """
    radius = torch.tensor([entry.radius], dtype=entry.key.dtype, device=entry.key.device)
    if book is None:
        first = Codebook(entry.key[None], entry.value[None], radius, (entry.label,), rounding)
        return first, "new", 0
    distance, index = (t[0] for t in book.nearest(entry.key[None]))
    nearest = int(index)
    radii = book.radii.clone()
    if distance <= entry.radius + radii[nearest] and book.labels[nearest] == entry.label:
        radii[nearest] = torch.maximum(radii[nearest], distance)
        values = book.values.clone()
        values[nearest] = entry.value
        return replace(book, values=values, radii=radii), "expand", nearest
    if bool(indistinct(distance, book.keys[nearest], book.rounding)):
        radii[nearest] = torch.minimum(radii[nearest], radius[0])
        keys, values = book.keys.clone(), book.values.clone()
        keys[nearest], values[nearest] = entry.key, entry.value
        labels = (*book.labels[:nearest], entry.label, *book.labels[nearest + 1 :])
        return Codebook(keys, values, radii, labels, book.rounding), "replace", nearest
    rule = "new"
    if distance <= entry.radius + radii[nearest]:
        rule, radius = "split", (distance / 2)[None]
        radii[nearest] = distance / 2 - SPLIT_GAP
    grown = Codebook(
        torch.cat([book.keys, entry.key[None]]),
        torch.cat([book.values, entry.value[None]]),
        torch.cat([radii, radius]),
        (*book.labels, entry.label),
        book.rounding,
    )
    return grown, rule, len(grown.labels) - 1


def build_codebook(entries: Sequence[CodebookEntry], rounding: float = 0.0) -> Codebook | None:
    """The codebook that entries make when they are written one after another."""
    book: Codebook | None = None
    for entry in entries:
        book, _, _ = write_entry(book, entry, rounding)
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
