"""What a runner needs of a method, of an interrupted run, and of those who take its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import Edit
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.requests import EditRequest

EditFunction: TypeAlias = Callable[[Sequence[EditRequest]], Edit]
EditEachFunction: TypeAlias = Callable[[Sequence[Sequence[EditRequest]]], Iterable[Edit]]
#: Takes the name of an edit and the edit, as soon as it has been computed.
EditSink: TypeAlias = Callable[[str, Edit], None]
#: Takes a new record, and the edit it was scored under; ``None`` at later stages of a stream.
RecordSink: TypeAlias = Callable[[ExampleRecord, Edit | None], None]


class SavedRun(Protocol):
    """Records and edits that an interrupted run has saved."""

    resumed: bool

    def record(self, id: str, stage: str) -> ExampleRecord | None:
        """The record of an example at a stage, if it was written."""

    def has_edit(self, name: str) -> bool:
        """Whether an edit was saved."""

    def edit(self, name: str, base: BaseModel) -> Edit | None:
        """An edit by its name, if it was saved."""
