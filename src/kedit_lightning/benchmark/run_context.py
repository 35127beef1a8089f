"""What a run tells its method: protocol, seed, data, output, and sinks of edits and records."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lightning.pytorch import LightningDataModule, Trainer

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark.edit_callback import EditCallback
from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.data.datamodule import EditDataModule, Split
from kedit_lightning.edits import Edit
from kedit_lightning.image_reference import Image
from kedit_lightning.metrics import EditMetrics, ExampleRecord, LegacyEasyEdit, SquadMetrics
from kedit_lightning.requests import EditRequest
from kedit_lightning.run_seed import run_seed

Metrics: TypeAlias = EditMetrics | LegacyEasyEdit


@dataclass
class PromptBatch:
    """Prompts that travel together through Lightning's loops, as text."""

    prompts: list[str]
    images: Sequence[Image | None] | None = None

    def to(self, *args: Any, **kwargs: Any) -> PromptBatch:
        """Return the batch itself; text has no device."""
        return self

    def __len__(self) -> int:
        return len(self.prompts)


def new_metrics(protocol: Protocol, seed: int = 0) -> Metrics:
    """The metrics of a protocol's scoring and rule for answers.

    Args:
        protocol: How answers are scored.
        seed: Seed of the draws of the intervals.
    """
    if protocol.scoring == "legacy_easyedit":
        return LegacyEasyEdit(seed=seed)
    kind = SquadMetrics if protocol.answers == "squad" else EditMetrics
    return kind(seed=seed)


class SavedRun(typing.Protocol):
    """An output folder, with the records and edits of the interrupted run that it continues."""

    resumed: bool

    def record(self, id: str, stage: str) -> ExampleRecord | None:
        """The record of an example at a stage, if it was written."""

    def has_edit(self, name: str) -> bool:
        """Whether an edit was saved."""

    def edit(self, name: str, base: BaseModel, requests: Sequence[EditRequest]) -> Edit | None:
        """An edit by its name, if it was saved; one of other requests is refused."""


def ignore(*result: object) -> None:
    """Take an edit or a record and do nothing with it."""


@dataclass
class RunContext:
    """A run, as its method and its callbacks see it.

    ``EditTrainer`` attaches one to the method for each run; Lightning's own trainer attaches none.

    Args:
        protocol: How edits are applied and scored.
        seed: Seed of the run: what ``seed_everything`` was last called with, or else 0.
        data: Where examples come from.
        output: The output folder, if the run has one.
        ledger: The edits of a ledger that the run adds to, if there is one.
        editing: Whether this is ``kedit edit``.
        left_out: Requests that ``kedit edit`` does not write, since they are to hold together and a
            later one overwrites them: the id of their example, and their place in it.
        on_computed: Takes the name of each edit and the edit before anything is done with it; may
            end a stream of edits (:class:`StreamStopped`).
        on_edit: Takes the name of each edit and the edit, as soon as it has been computed.
        on_record: Takes each new record and the edit it was scored under, which is ``None`` at
            later stages of a sequential run.
        on_checkpoint: Takes the number of facts written so far, whenever a stream of edits has come
            to one of its checkpoints or to its end.
    """

    protocol: Protocol = Protocol()  # noqa: RUF009 - it is frozen
    seed: int = field(default_factory=run_seed)
    data: LightningDataModule | None = None
    output: SavedRun | None = None
    ledger: SavedRun | None = None
    editing: bool = False
    left_out: Collection[tuple[str, int]] = frozenset()
    on_computed: Callable[[str, Edit], None] = ignore
    on_edit: Callable[[str, Edit], None] = ignore
    on_record: Callable[[ExampleRecord, Edit | None], None] = ignore
    on_checkpoint: Callable[[int], None] = ignore

    @classmethod
    def under(cls, trainer: Trainer) -> RunContext:
        """The context under Lightning's own trainer, which attaches none."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EditCallback) and callback.takes_edits:
                warnings.warn(
                    f"{type(callback).__name__} is told of edits by kedit_lightning.EditTrainer "
                    "alone, and does nothing under another trainer",
                    stacklevel=2,
                )
        return cls(data=trainer.datamodule)  # type: ignore[attr-defined]

    @property
    def saved(self) -> SavedRun | None:
        """Records and edits of the interrupted run that this one continues."""
        return self.output if self.output is not None and self.output.resumed else self.ledger

    def source(self, split: Split) -> dict[str, Any]:
        """Path, hash and number of records of a split; empty where the data does not say."""
        return self.data.source.get(split, {}) if isinstance(self.data, EditDataModule) else {}
