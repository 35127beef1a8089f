"""What a stream of edits does to the model as a whole, checkpoint by checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from kedit_lightning.benchmark import EditCallback
from kedit_lightning.benchmark.canary import (
    Canary,
    WeightGrowth,
    perplexity_collapse,
)
from kedit_lightning.data.plain_text import passages_of
from kedit_lightning.errors import ResumeError, UnsupportedUseError
from kedit_lightning.methods.method import as_edit_method
from kedit_lightning.runs.output_folder import output_of


class StreamDrift(EditCallback):
    """Follows what a sequential run of ``kedit test`` does to the model as a whole.

    At each checkpoint of the protocol (``every``) and at the end it reads the same passages of
    plain text and tells their perplexity, the KL divergence from the base model on them, and how
    far the edited weights have moved. A table shows it, and with an output folder ``drift.json``.
    A model whose perplexity is ten times that of the base model counts as collapsed.

    Args:
        text: Text file with a passage a line, of which 64 are read; packaged passages if not given.
        console: Where the table is shown; the terminal if not given.
    """

    def __init__(self, text: str | Path | None = None, console: Console | None = None) -> None:
        self.text = text
        self.console = console or Console()
        #: What was found, checkpoint by checkpoint; the first one is the base model.
        self.checkpoints: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before anything is loaded that there is a stream to follow.

        Raises:
            UnsupportedUseError: The run is no sequential test.
        """
        if stage != "test" or as_edit_method(pl_module).run.protocol.grouping != "sequential":
            raise UnsupportedUseError(
                "StreamDrift follows a stream of edits; use it with `kedit test` and "
                "--trainer.protocol.mode sequential, or leave it out"
            )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the passages on the base model; a resumed run goes on from its file.

        Raises:
            ResumeError: The file is of other passages.
        """
        if not trainer.is_global_zero:
            return
        method = as_edit_method(pl_module)
        base, run, folder = method.base, method.run, output_of(method.run)
        path = None if self.text is None else Path(self.text).expanduser()
        passages = passages_of(path, run.seed)
        self._canary = Canary(base, passages, run.protocol.score_batch_size)
        self._growth = WeightGrowth(base)
        start = {"facts": 0, "perplexity": self._canary.base_perplexity(), "kl": 0.0}
        self.checkpoints = [{**start, "kl_p95": 0.0, "weights": {}}]
        if folder is not None and folder.resumed and (folder.path / "drift.json").is_file():
            found = json.loads((folder.path / "drift.json").read_text(encoding="utf-8"))
            if found["text"]["sha256"] != self._canary.sha256:
                raise ResumeError(
                    f"{folder.path} / drift.json is of other passages; name the text that the run "
                    "was started with, or delete that file to have all checkpoints read again"
                )
            self.checkpoints = found["checkpoints"]

    def on_stream_checkpoint(self, trainer: Trainer, method: LightningModule, facts: int) -> None:
        """Measure the model under the edits so far, unless an interrupted run has."""
        if any(entry["facts"] == facts for entry in self.checkpoints):
            return
        weights = self._growth.measure(list(self._canary.base.edits))
        entry = {"facts": facts, **self._canary.measure(), "weights": weights}
        self.checkpoints.append(entry)
        if (folder := output_of(as_edit_method(method).run)) is not None:
            text = {"path": None if self.text is None else str(self.text)}
            text["sha256"] = self._canary.sha256
            folder.write_json("drift.json", {
                "text": text,
                "collapse": perplexity_collapse(self.checkpoints),
                "checkpoints": self.checkpoints,
            })  # fmt: skip

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the table."""
        if trainer.is_global_zero:
            self.console.print(self.table())

    def table(self) -> Table:
        """Perplexity, divergence and the largest change of a weight, by the number of facts."""
        collapse = perplexity_collapse(self.checkpoints)
        caption = "weights: ‖W - W₀‖ / ‖W₀‖ of the parameter that has moved most"
        if collapse is not None:
            caption += f"; collapsed after {collapse} facts"
        table = Table(title="the model on plain text", caption=caption)
        for name in ("facts", "perplexity", "KL", "weights"):
            table.add_column(name, justify="right")
        for entry in self.checkpoints:
            moved = [weight["change"] for weight in entry["weights"].values()]
            change = f"{max(moved):.4f}" if moved else "–"
            shown = (f"{entry['perplexity']:,.2f}", f"{entry['kl']:.4f}", change)
            table.add_row(str(entry["facts"]), *shown)
        return table
