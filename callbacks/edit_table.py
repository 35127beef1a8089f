"""A table of edits that grows during a run."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kedit_lightning.benchmark import EditCallback
from kedit_lightning.edits import Edit
from kedit_lightning.methods.method import as_edit_method
from kedit_lightning.metrics import ExampleRecord, ProbeReading, ProbeRecord
from kedit_lightning.metrics.functional import answer_text
from kedit_lightning.runs.output_folder import output_of

#: Characters of an answer that are shown.
_SHOWN = 60


class EditTable(EditCallback):
    """Shows each edited fact: prompt, answer before, answer wanted, answer after.

    The answer after is that right after the edit; of ``kedit edit``, where all facts are scored
    together in the end, that under all edits.

    Args:
        only_edit: Show it for ``kedit edit`` alone, not for ``kedit test``.
        max_rows: Facts shown; of longer runs the latest ones.
        console: Where it is shown; the terminal if not given.
    """

    def __init__(
        self, only_edit: bool = False, max_rows: int = 40, console: Console | None = None
    ) -> None:
        self.only_edit = only_edit
        self.max_rows = max_rows
        self.console = console or Console()
        self._rows: list[tuple[Text, ...]] = []
        self._count = 0
        self._stage, self._editing = "", False
        self._live: Live | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an empty table."""
        run = as_edit_method(pl_module).run
        self._rows, self._count = [], 0
        self._stage, self._editing = "immediate", run.editing
        if trainer.is_global_zero and (self._editing or not self.only_edit):
            self._live = Live(
                console=self.console, auto_refresh=False, transient=self.console.is_terminal
            )
            if self.console.is_terminal:
                self._live.start()
            folder = output_of(run)
            if self._editing and folder is not None and folder.resumed:
                for record in folder.records():
                    self._add(record)

    def on_example_result(
        self, trainer: Trainer, method: LightningModule, record: ExampleRecord, edit: Edit | None
    ) -> None:
        """Add the facts of an example."""
        self._add(record)

    def _add(self, record: ExampleRecord) -> None:
        if self._live is None:
            return
        if self._editing and record["stage"] == "final" != self._stage:
            self._rows, self._count, self._stage = [], 0, "final"
        if record["stage"] != self._stage:
            return
        for probe in record["probes"]:
            if probe["kind"] == "rewrite":
                self._count += 1
                self._rows = [*self._rows, row(probe)][-self.max_rows :]
        if self.console.is_terminal:
            self._live.update(self.table(), refresh=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the whole table on the screen."""
        live, self._live = self._live, None
        if live is not None and live.is_started:
            live.stop()
        if live is not None and self._rows:
            self.console.print(self.table())

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave what there is on the screen."""
        self.on_test_end(trainer, pl_module)

    def table(self) -> Table:
        """The table as it stands."""
        hidden = self._count - len(self._rows)
        table = Table(title=f"Edits ({hidden} earlier ones not shown)" if hidden else "Edits")
        for name in ("prompt", "before", "wanted", "after"):
            table.add_column(name, overflow="fold")
        for cells in self._rows:
            table.add_row(*cells)
        return table


def row(probe: ProbeRecord) -> tuple[Text, ...]:
    """Cells of a rewrite probe; the answer after is green if it is the wanted one.

    Args:
        probe: A probe of an example record.
    """
    right = bool(probe["after"].get("tf_all"))
    wanted = probe["answers"][0].strip()
    return (
        Text(probe["prompt"]),
        Text(_shown(probe["before"])),
        Text(wanted),
        Text(_shown(probe["after"]), style="green" if right else "red"),
    )


def _shown(reading: ProbeReading) -> str:
    text = reading.get("text")
    if text is not None:
        answer = answer_text(str(text))
        return answer if len(answer) <= _SHOWN else f"{answer[:_SHOWN]}…"
    # Without a free answer the probability of the wanted one is what there is.
    log_prob = reading.get("log_prob")
    return "" if log_prob is None else f"log p = {log_prob:.2f}"
