"""Writes results as they come, and their summary at the end."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from kedit_lightning.benchmark import EditCallback
from kedit_lightning.data import EditDataModule
from kedit_lightning.edits import Edit
from kedit_lightning.methods.method import as_edit_method
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.runs.html_report import html_report
from kedit_lightning.runs.output_folder import output_of
from kedit_lightning.runs.results import run_facts, run_settings, summary_of


class ResultsWriter(EditCallback):
    """Writes the results of ``test`` and ``edit`` into the output folder.

    Without an output folder (``--output``) it does nothing. ``results.jsonl`` gets one line per
    example as soon as it is scored; ``results.json`` (scores with intervals, facts of the run),
    ``results.csv`` (a line per probe) and ``report.html`` (a page with all of it) are written at
    the end.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the settings of the run, or compare them with those of the run continued."""
        method = as_edit_method(pl_module)
        folder = output_of(method.run)
        if folder is not None and trainer.is_global_zero:
            data = method.run.data
            examples = data.examples() if isinstance(data, EditDataModule) else ()
            settings = run_settings(method, method.base, method.run)
            folder.start(settings, examples, method.run.left_out)

    def on_example_result(
        self, trainer: Trainer, method: LightningModule, record: ExampleRecord, edit: Edit | None
    ) -> None:
        """Append a record; it is on disk before the next example starts."""
        if (folder := output_of(as_edit_method(method).run)) is not None:
            folder.append(record)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the summary, computed anew from all records that were written."""
        method = as_edit_method(pl_module)
        run, folder = method.run, output_of(method.run)
        if folder is None:
            return
        trainer.strategy.barrier("results are written")
        if trainer.is_global_zero:
            facts = run_facts(method, method.base, run, method.settings.reported())
            records = list(folder.records())
            summary = summary_of(records, run.protocol, run.seed)
            folder.write_csv(records)
            page = html_report(facts, summary["scores"], records, summary.get("retention"))
            folder.write_text("report.html", page)
            # Last: with it a run counts as finished.
            folder.write_json("results.json", {**facts, **summary})
