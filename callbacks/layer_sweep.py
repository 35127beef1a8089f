"""Sweep over layers during ``validate`` or ``test``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from kedit_lightning.analysis.sweep import best_layer, sweep_layers
from kedit_lightning.benchmark import EditCallback
from kedit_lightning.benchmark.quality import JUDGED_BY
from kedit_lightning.data.datamodule import Split
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.method import EditMethod, as_edit_method
from kedit_lightning.runs.output_folder import output_of


class LayerSweep(EditCallback):
    """Edits the examples of ``kedit validate`` or ``kedit test`` at one layer after another.

    Before the run itself, the same method, with its other settings as they are, goes through the
    same examples under the same protocol at every layer. A table shows for each layer the share of
    facts written (``rewrite``), written in other words (``rephrase``), neighbouring facts still
    right (``known``) and arg-max tokens unchanged elsewhere (``kept``). ``score`` is the harmonic
    mean of rewrite, rephrase and known (kept where nothing was known), as far as the data has them.

    With an output folder it writes ``layer_sweep.json``, which has the intervals too.

    Args:
        layers: Layers to try, counted from 0; all if not given.
        console: Where the table is shown; the terminal if not given.
    """

    def __init__(self, layers: list[int] | None = None, console: Console | None = None) -> None:
        self.layers = layers
        self.console = console or Console()
        #: Scores of the last sweep, layer by layer.
        self.found: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before anything is loaded that there is something to sweep.

        Raises:
            UnsupportedUseError: The method edits no layer of choice, or ``fit`` was called.
        """
        name = type(pl_module).__name__
        if stage not in ("validate", "test"):
            raise UnsupportedUseError(
                "LayerSweep measures edits; use it with `kedit validate` or `kedit test` only"
            )
        if not {"layer", "layers"} & set(pl_module.hparams):
            raise UnsupportedUseError(
                f"{name} has no setting for the layer that is edited, so LayerSweep has nothing to "
                "change; leave it out, or choose a method that edits a layer, such as ROME"
            )
        if trainer.datamodule is None:  # type: ignore[attr-defined]
            raise UnsupportedUseError("LayerSweep takes its examples from a data module; pass one")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sweep over the validation split."""
        self._sweep(trainer, as_edit_method(pl_module), "validation")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sweep over the test split."""
        self._sweep(trainer, as_edit_method(pl_module), "test")

    def _sweep(self, trainer: Trainer, method: EditMethod, split: Split) -> None:
        """Sweep over all examples of a split; on several devices the first process does."""
        if not trainer.is_global_zero:
            return
        self.found = []
        for entry in sweep_layers(method, split, self.layers):
            self.found.append(entry)
            result = f"score {_shown(entry)}" if "error" not in entry else str(entry["error"])
            self.console.print(f"layer {entry['layer']}: {result}", highlight=False, markup=False)
        name = type(method).__name__
        self.console.print(self.table(f"{name}, layer by layer ({split})"))
        folder = output_of(method.run)
        if folder is not None:
            content = {"method": name, "best": self.best, "layers": self.found}
            folder.write_json("layer_sweep.json", content)

    @property
    def best(self) -> int | None:
        """Layer with the highest score, the first of several; ``None`` when nothing was scored."""
        return best_layer(self.found)

    def table(self, title: str) -> Table:
        """Scores by layer, the best layer marked.

        Args:
            title: Title of the table.
        """
        table = Table(title=title)
        for name in ("layer", *JUDGED_BY, "score", ""):
            table.add_column(name, justify="right")
        for entry in self.found:
            best = entry["layer"] == self.best
            cells = [_shown(entry, name) for name in (*JUDGED_BY, "score")]
            row = [str(entry["layer"]), *cells, "best" if best else ""]
            table.add_row(*row, style="bold green" if best else None)
        return table


def _shown(entry: dict[str, Any], name: str = "score") -> str:
    value = entry.get(name)
    return "–" if value is None else f"{value:.3f}"
