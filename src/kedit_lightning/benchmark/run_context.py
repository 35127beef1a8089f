"""What a run tells its method: protocol, seed, data, output, and where edits and records go."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from lightning.pytorch import LightningDataModule, Trainer

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark.edit_callback import edit_hooks_of
from kedit_lightning.benchmark.interfaces import (
    EditEachFunction,
    EditFunction,
    EditSink,
    RecordSink,
    SavedRun,
)
from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.benchmark.quality import judged
from kedit_lightning.benchmark.runner import ProtocolRunner
from kedit_lightning.data.datamodule import EditDataModule, Split
from kedit_lightning.metrics import EditMetrics, LegacyEasyEdit, SummaryRow

Metrics: TypeAlias = EditMetrics | LegacyEasyEdit


@dataclass
class PromptBatch:
    """Prompts that travel together through Lightning's loops, as text."""

    prompts: list[str]

    def to(self, *args: Any, **kwargs: Any) -> PromptBatch:
        """Return the batch itself; text has no device."""
        return self

    def __len__(self) -> int:
        return len(self.prompts)


def run_seed() -> int:
    """The seed of the run: what ``seed_everything`` was last called with, or else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED") or 0)


def new_metrics(protocol: Protocol) -> Metrics:
    """The metrics of a protocol's scoring."""
    return LegacyEasyEdit() if protocol.scoring == "legacy_easyedit" else EditMetrics()


@dataclass
class RunContext:
    """A run, as its method and its callbacks see it.

    ``EditTrainer`` attaches one to the method for each run.  Under Lightning's own trainer a
    default one takes its place: the default protocol, no output, and no one to report to.

    Args:
        protocol: How edits are applied and scored.
        seed: Seed of the run.
        data: Where examples come from.
        output: The output folder, if the run has one.
        editing: Whether this is ``kedit edit``.
        on_edit: Takes each edit as soon as it has been computed.
        on_record: Takes each record as soon as it is complete.
    """

    protocol: Protocol = Protocol()  # noqa: RUF009 - it is frozen
    seed: int = field(default_factory=run_seed)
    data: LightningDataModule | None = None
    output: SavedRun | None = None
    editing: bool = False
    on_edit: EditSink | None = None
    on_record: RecordSink | None = None
    #: Runs the chunks of the present pass over a split.
    runner: ProtocolRunner = field(init=False, repr=False)
    #: Scores of the present pass.
    metrics: Metrics = field(init=False, repr=False)

    @classmethod
    def under(cls, trainer: Trainer) -> RunContext:
        """The context under Lightning's own trainer, which attaches none."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hooks := edit_hooks_of(callback):
                warnings.warn(
                    f"{type(callback).__name__} needs kedit_lightning.EditTrainer; "
                    f"{type(trainer).__name__} does not call its hooks {', '.join(hooks)}",
                    stacklevel=2,
                )
        return cls(data=trainer.datamodule)  # type: ignore[attr-defined]

    @property
    def saved(self) -> SavedRun | None:
        """Records and edits of the interrupted run that this one continues."""
        return self.output if self.output is not None and self.output.resumed else None

    def source(self, split: Split) -> dict[str, Any]:
        """Path, hash and number of records of a split; empty where the data does not say."""
        if not isinstance(self.data, EditDataModule):
            return {}
        return self.data.source.get(split, {})

    def start(
        self,
        trainer: Trainer,
        base: BaseModel,
        edit: EditFunction,
        edit_each: EditEachFunction,
        split: Split,
    ) -> None:
        """Begin a pass over a split, with a new runner and empty metrics.

        Args:
            trainer: The trainer that runs it.
            base: The base model.
            edit: Computes an edit from requests.
            edit_each: Computes the edits of several examples independently of each other.
            split: The split whose examples follow.
        """
        protocol = self.protocol
        if trainer.state.fn == "fit":
            # Free answers would take longer than the training that the validation watches over.
            protocol = replace(protocol, generate=False)
        self.metrics = new_metrics(protocol).to(trainer.strategy.root_device)
        self.runner = ProtocolRunner(
            base,
            edit,
            protocol,
            dataset=str(self.source(split).get("sha256", "")),
            seed=self.seed,
            saved=self.saved,
            on_edit=self.on_edit,
            on_record=self.on_record,
            edit_each=edit_each,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def finish(self, prefix: str) -> tuple[list[SummaryRow], dict[str, float]]:
        """Score what is scored at the end of a pass, and restore the stack.

        Args:
            prefix: Goes before the name of each score.

        Returns:
            Scores with their intervals, and all numbers by name for logging.
        """
        for record in self.runner.finish():
            self.metrics.update(record)
        rows, scores = self.metrics.summary(), self.metrics.compute()
        score = judged(scores)["score"]
        if prefix and score is not None:
            scores["score"] = score  # one number for early stopping and for the best checkpoint
        return rows, {f"{prefix}{key}": value for key, value in scores.items()}

    def close(self) -> None:
        """Restore the stack, however the run ended."""
        if "runner" in vars(self):
            self.runner.close()

    def answers(self, base: BaseModel, prompts: Sequence[str]) -> list[dict[str, str]]:
        """Free answers to prompts by the unedited base model, and under the applied edits.

        Args:
            base: The base model.
            prompts: The prompts.

        Returns:
            ``prompt``, ``base`` and ``edited`` for each prompt.
        """
        settings: dict[str, Any] = {
            "max_new_tokens": self.protocol.max_new_tokens,
            "batch_size": self.protocol.score_batch_size,
            "stop_at_sentence": True,
        }
        with base.edits.suspended():
            unedited = base.generate(prompts, **settings)
        edited = base.generate(prompts, **settings) if base.edits.active else unedited
        return [
            {"prompt": prompt, "base": before, "edited": after}
            for prompt, before, after in zip(prompts, unedited, edited, strict=True)
        ]
