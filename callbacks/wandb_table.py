"""Edits and scores in Weights & Biases."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from kedit_lightning.benchmark import EditCallback
from kedit_lightning.edits import Edit
from kedit_lightning.methods.method import as_edit_method
from kedit_lightning.metrics import ExampleRecord

_COLUMNS = ["id", "stage", "kind", "group", "prompt", "wanted", "before", "after", "exact"]


class WandbTable(EditCallback):
    """Logs a table of all probes, and every score with its interval, through a ``WandbLogger``.

    Without such a logger it does nothing.

    Args:
        max_rows: Probes the table holds at most; the first ones.
    """

    def __init__(self, max_rows: int = 10_000) -> None:
        self.max_rows = max_rows
        self._rows: list[list[Any]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an empty table."""
        self._rows = []

    def on_example_result(
        self, trainer: Trainer, method: LightningModule, record: ExampleRecord, edit: Edit | None
    ) -> None:
        """Add the probes of an example."""
        for probe in record["probes"]:
            if len(self._rows) < self.max_rows:
                texts = [probe["before"].get("text"), probe["after"].get("text")]
                wanted = " | ".join(probe["answers"])
                exact = probe["after"].get("tf_all")
                named = [probe["kind"], probe["group"], probe["prompt"], wanted]
                self._rows.append([record["id"], record["stage"], *named, *texts, exact])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the table, and the scores as the summary of the run."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not loggers or not trainer.is_global_zero:
            return
        scores: dict[str, float] = {}
        for row in as_edit_method(pl_module).summary:
            scores |= {row.key: row.mean, f"{row.key}/low": row.low, f"{row.key}/high": row.high}
        for logger in loggers:
            logger.log_table(key="probes", columns=_COLUMNS, data=self._rows)
            # A summary holds one number per name; a curve would have a single point.
            logger.experiment.summary.update(scores)
