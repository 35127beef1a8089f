"""Worker processes that open the pictures of the next batches, and run the processor on them.

Workers get references and an encoder of pictures, never a model.  Prompts are made into tokens
where the model is, since applied edits may rewrite them; what a processor makes of the pictures
does not depend on the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch.utils.data import DataLoader

from kedit_lightning.image_reference import references
from kedit_lightning.requests import EditBatch

#: References to the pictures of a row.
Names: TypeAlias = tuple[str, ...]


class PictureEncoder(Protocol):
    """What workers need of an encoder of pictures."""

    kept_bytes: int

    def seen(self, images: Names) -> Any:
        """What the processor makes of pictures, and its size in bytes."""

    def take(self, images: Names, seen: Any) -> None:
        """Keep what another process has made of pictures."""


def _prepared(encoder: PictureEncoder, rows: Sequence[Names]) -> list[tuple[Names, Any]]:
    """What becomes of the pictures of rows; runs in a worker.

    What cannot be read is left out: it is tried again where a row about it is made, and reported
    there.  So is what would not be kept.
    """
    found, size = list[tuple[Names, Any]](), 0
    for images in rows:
        with suppress(Exception):  # processors refuse pictures with errors of many kinds
            seen = encoder.seen(images)
            size += seen.nbytes
            if size > encoder.kept_bytes // 2:  # a loader may be a batch ahead
                break
            found.append((images, seen))
    return found


def _pictures(batch: EditBatch) -> list[Names]:
    """The pictures of all rows of a batch, equal ones once."""
    images = [r.image for e in batch.examples for r in e.requests]
    images += [p.image for e in batch.examples for p in e.probes]
    return [names for names in dict.fromkeys(map(references, images)) if names]


def with_pictures(
    batches: Sequence[EditBatch], workers: int, encoder: PictureEncoder | None
) -> Iterator[EditBatch]:
    """The batches; pictures of the next ones are prepared while one is worked on.

    Args:
        batches: The batches.
        workers: Number of processes; 0 leaves pictures to be opened when rows are made.
        encoder: Encoder of the pictures, which gets what workers made of them.
    """
    rows = [_pictures(batch) for batch in batches] if workers else []
    if encoder is None or not any(rows):
        yield from batches
        return
    # A generator of its own: the seed that is drawn for workers must not move that of the run.
    loader: Any = DataLoader(
        rows,  # type: ignore[arg-type]  # a list has all that is asked of a dataset
        batch_size=None,
        num_workers=workers,
        collate_fn=partial(_prepared, encoder),
        generator=torch.Generator(),
    )
    for batch, prepared in zip(batches, loader, strict=True):
        for images, seen in prepared:
            encoder.take(images, seen)
        yield batch
