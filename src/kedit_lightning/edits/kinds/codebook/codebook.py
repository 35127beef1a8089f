"""The codebook of GRACE: keys, values and radii (Hartvigsen et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.edits.rounding import indistinct

Replacement: TypeAlias = Literal["last", "prompt", "all"]

#: Half the entries that a growing codebook has room for at first.
_ROWS = 16
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


@dataclass
class _Room:
    """Memory of keys and values, of which the first ``used`` rows hold something."""

    keys: Tensor
    values: Tensor
    used: int = 0


@dataclass(frozen=True)
class Codebook:
    """Keys ``[n, d_in]``, values ``[n, d_out]``, radii ``[n]``, and the labels of the entries.

    ``rounding`` is the distance, relative to its norm, within which a key is itself; ``room`` is
    where its keys and values grow.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: tuple[tuple[int, ...], ...]
    rounding: float = 0.0
    room: _Room | None = field(default=None, repr=False, compare=False)

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


@dataclass(frozen=True)
class Placement:
    """Where GRACE's rules put an entry.

    Args:
        rule: ``new``, ``split``, ``expand`` or ``replace``.
        index: Index of the entry that then answers for the key.
        radii: Radii of all entries then, the new one included. Shape ``[n]``.
    """

    rule: str
    index: int
    radii: Tensor


def placement(book: Codebook | None, entry: CodebookEntry) -> Placement:
    """Place an entry by GRACE's rules (Hartvigsen et al. 2023, algorithm 1), and one beside them.

    The algorithm splits the balls of different answers, also where their keys are equal: neither
    ball is left.  Here the new entry then takes the place of the old one, with a radius that is no
    larger than that of either.
    """
    radius = torch.tensor([entry.radius], dtype=entry.key.dtype, device=entry.key.device)
    if book is None:
        return Placement("new", 0, radius)
    distance, index = (t[0] for t in book.nearest(entry.key[None]))
    nearest, radii = int(index), book.radii.clone()
    touches = bool(distance <= entry.radius + radii[nearest])
    if touches and book.labels[nearest] == entry.label:
        radii[nearest] = torch.maximum(radii[nearest], distance)
        return Placement("expand", nearest, radii)
    if bool(indistinct(distance, book.keys[nearest], book.rounding)):
        radii[nearest] = torch.minimum(radii[nearest], radius[0])
        return Placement("replace", nearest, radii)
    if touches:
        radius = (distance / 2)[None]
        radii[nearest] = distance / 2 - SPLIT_GAP
    return Placement("split" if touches else "new", len(radii), torch.cat([radii, radius]))


def write_entry(
    book: Codebook | None, entry: CodebookEntry, rounding: float = 0.0
) -> tuple[Codebook, str, int]:
    """Add an entry where :func:`placement` puts it.

    Args:
        book: The codebook so far.
        entry: The entry to add.
        rounding: Relative distance within which keys are equal, for a codebook that begins.

    Returns:
        The new codebook, which rule applied, and the index of the entry that answers for the key.
    """
    placed = placement(book, entry)
    rule, index, radii = placed.rule, placed.index, placed.radii
    if book is None:
        first = Codebook(entry.key[None], entry.value[None], radii, (entry.label,), rounding)
        return first, rule, index
    if index == len(book.labels):
        return _grown(book, entry, radii), rule, index
    values = book.values.clone()
    values[index] = entry.value
    if rule == "expand":
        return replace(book, values=values, radii=radii, room=None), rule, index
    keys = book.keys.clone()
    keys[index] = entry.key
    labels = (*book.labels[:index], entry.label, *book.labels[index + 1 :])
    return Codebook(keys, values, radii, labels, book.rounding), rule, index


def _grown(book: Codebook, entry: CodebookEntry, radii: Tensor) -> Codebook:
    """A codebook with an entry behind the others, which stay where they are while there is room."""
    count, room = len(book.labels), book.room
    # Of codebooks that grow from one in two ways, the first takes the room behind it.
    if room is None or room.used != count or count == len(room.keys):
        room = _Room(_with_room(book.keys), _with_room(book.values))
    room.keys[count], room.values[count] = entry.key, entry.value
    room.used = count + 1
    labels = (*book.labels, entry.label)
    keys, values = room.keys[: room.used], room.values[: room.used]
    return Codebook(keys, values, radii, labels, book.rounding, room)


def _with_room(rows: Tensor) -> Tensor:
    """Rows ``[n, d]`` at the beginning of a matrix of twice as many."""
    memory = rows.new_empty(2 * max(_ROWS, len(rows)), rows.shape[1])
    memory[: len(rows)] = rows
    return memory


def build_codebook(
    entries: Sequence[CodebookEntry], rounding: float = 0.0, book: Codebook | None = None
) -> Codebook | None:
    """The codebook that entries make when they are written one after another.

    Args:
        entries: The entries.
        rounding: Relative distance within which keys are equal.
        book: A codebook that they are added to.
    """
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
