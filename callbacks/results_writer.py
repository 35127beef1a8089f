"""Writes results as they come, and their summary at the end."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.runs.results import run_facts, run_settings, summary_of


class ResultsWriter(Callback):
    """Writes the results of ``test`` and ``edit`` into the output folder.

    Without an output folder (``--output``) it does nothing. ``results.jsonl`` gets a line an
    example as soon as it is scored; ``results.json`` (scores with intervals, facts of the run) and
    ``results.csv`` (a line a probe) are written at the end.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the settings of the run, or compare them with those of the run continued."""
        folder = getattr(trainer, "output_folder", None)
        if folder is not None and trainer.is_global_zero:
            folder.start(run_settings(trainer, pl_module))

    def on_example_result(
        self, trainer: Trainer, method: LightningModule, record: ExampleRecord, edit: Any
    ) -> None:
        """Append a record; it is on disk before the next example starts."""
        folder = getattr(trainer, "output_folder", None)
        if folder is not None:
            folder.append(record)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the summary, computed anew from all records that were written."""
        folder = getattr(trainer, "output_folder", None)
        if folder is None:
            return
        trainer.strategy.barrier("results are written")
        if trainer.is_global_zero:
            protocol: Any = getattr(trainer, "protocol", None)
            summary = summary_of(folder.records(), protocol)
            folder.write_json("results.json", {**run_facts(trainer, pl_module), **summary})
            folder.write_csv()
