"""The test, validation and prediction steps that all editing methods share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.benchmark.quality import judged
from kedit_lightning.benchmark.runner import ProtocolRunner, Scored
from kedit_lightning.edits import Edit
from kedit_lightning.errors import EditOrderError
from kedit_lightning.metrics import EditMetrics, LegacyEasyEdit, SummaryRow
from kedit_lightning.requests import EditBatch, EditRequest

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Module
else:
    _Module = object

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


class EvaluationSteps(_Module):
    """Steps of ``test``, ``validate`` and ``predict``.

    They run the protocol of the trainer, score what it gives, and hand each record to the trainer
    as soon as it is complete.
    """

    #: Scores of the last run with their intervals.
    summary: Sequence[SummaryRow] = ()

    if TYPE_CHECKING:

        @property
        def base(self) -> BaseModel:
            """The base model."""

        def edit(self, requests: Sequence[EditRequest]) -> Edit:
            """Compute an edit."""

        def edit_each(self, requests: Sequence[Sequence[EditRequest]]) -> Iterable[Edit]:
            """Compute the edits of several examples apart from each other."""

    # ---- test and validate

    def on_test_epoch_start(self) -> None:
        """Make the runner and empty metrics."""
        self._evaluation_start("test")

    def test_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Edit and score one chunk."""
        self._evaluation_chunk(batch, batch_idx, sum(self.trainer.num_test_batches))

    def on_test_epoch_end(self) -> None:
        """Score what is scored at the end, and log all metrics."""
        self._evaluation_end("")

    def on_validation_epoch_start(self) -> None:
        """Make the runner and empty metrics."""
        self._evaluation_start("validation")

    def validation_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Edit and score one chunk."""
        self._evaluation_chunk(batch, batch_idx, sum(self.trainer.num_val_batches))

    def on_validation_epoch_end(self) -> None:
        """Score what is scored at the end, and log all metrics."""
        self._evaluation_end("val/")

    def close_evaluation(self) -> None:
        """Bring the stack back to where it was before the run; does nothing when it is there."""
        runner: ProtocolRunner | None = self.__dict__.pop("_evaluation_runner", None)
        if runner is not None:
            runner.close()

    def _evaluation_start(self, split: str) -> None:
        protocol = getattr(self.trainer, "protocol", None) or Protocol()
        if self.trainer.state.fn == "fit":
            # Free answers would take longer than the training they are to watch over.
            protocol = replace(protocol, generate=False)
        source = getattr(getattr(self.trainer, "datamodule", None), "source", {})
        # Plain attributes: neither is a part of the method that a checkpoint should hold.
        self.__dict__["_evaluation_metrics"] = new_metrics(protocol).to(self.device)
        self.__dict__["_evaluation_runner"] = ProtocolRunner(
            self.base,
            self.edit,
            protocol,
            dataset=str(source.get(split, {}).get("sha256", "")),
            seed=run_seed(),
            saved=getattr(self.trainer, "saved_run", None),
            on_edit=getattr(self.trainer, "record_edit", None),
            edit_each=self.edit_each,
        )

    def _evaluation_chunk(self, batch: EditBatch, batch_idx: int, total: float) -> None:
        runner: ProtocolRunner = self.__dict__["_evaluation_runner"]
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        if runner.protocol.mode == "sequential":
            if rank:  # every rank is given the whole stream; the first one runs it
                return
            ranks = 1
        index = batch_idx * ranks + rank
        self._evaluation_take(runner.chunk(batch.examples, index, last=batch_idx + 1 == total))

    def _evaluation_take(self, scored: Iterable[Scored]) -> None:
        hand_on = getattr(self.trainer, "record_example", None)
        for result in scored:
            self.__dict__["_evaluation_metrics"].update(result.record)
            if hand_on is not None and not result.replayed:
                hand_on(result.record, result.edit)

    def _evaluation_end(self, prefix: str) -> None:
        runner: ProtocolRunner = self.__dict__["_evaluation_runner"]
        metrics: Metrics = self.__dict__["_evaluation_metrics"]
        if self.trainer.global_rank == 0 or runner.protocol.mode != "sequential":
            self._evaluation_take(runner.finish())
        self.close_evaluation()
        self.summary = metrics.summary()
        values = metrics.compute()
        score = judged(values)["score"]
        if prefix and score is not None:
            values["score"] = score  # one number for early stopping and for the best checkpoint
        values = {f"{prefix}{key}": value for key, value in values.items()}
        # They are equal on all ranks already; Lightning warns where it is not told to make them so.
        self.log_dict(values, sync_dist=self.trainer.world_size > 1)

    # ---- predict

    def predict_step(self, batch: PromptBatch | EditBatch, batch_idx: int) -> list[dict[str, str]]:
        """Answer prompts with the unedited base model, and under the edits that are applied."""
        prompts = (
            batch.prompts
            if isinstance(batch, PromptBatch)
            else [request.prompt for request in batch.requests]
        )
        protocol = getattr(self.trainer, "protocol", None) or Protocol()
        answers = {}
        with self.base.edits.suspended():
            answers["base"] = self._evaluation_answer(prompts, protocol)
        answers["edited"] = (
            self._evaluation_answer(prompts, protocol)
            if self.base.edits.active
            else answers["base"]
        )
        return [
            {"prompt": prompt, "base": base, "edited": edited}
            for prompt, base, edited in zip(
                prompts, answers["base"], answers["edited"], strict=True
            )
        ]

    def _evaluation_answer(self, prompts: Sequence[str], protocol: Protocol) -> list[str]:
        return self.base.generate(
            prompts,
            max_new_tokens=protocol.max_new_tokens,
            batch_size=protocol.score_batch_size,
            stop_at_sentence=True,
        )


def apply_saved(edits: Iterable[Edit]) -> None:
    """Apply edits in order.

    Edits that were computed apart from each other are applied on top of each other all the same;
    one warning says so instead of one an edit.

    Raises:
        EditOrderError: An edit only makes sense on the stack it was computed on.
    """
    apart = 0
    for edit in edits:
        apart += bool(edit.origin.method) and edit.origin.stack != edit.base.edits.ids
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"edit \S+ by .* was computed on top of")
            try:
                edit.apply()
            except EditOrderError as error:
                raise EditOrderError(
                    f"{error}; `kedit edit --trainer.protocol.mode sequential` computes edits that "
                    "stand on each other"
                ) from error
    if apart:
        warnings.warn(
            "the saved edits were computed apart from each other, as single mode does; applied "
            "together they may act otherwise than they were scored",
            stacklevel=2,
        )
