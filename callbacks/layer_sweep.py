"""Measures which layer of the user's own model takes edits best."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from kedit_lightning.benchmark import EditCallback, ProtocolRunner, RunContext
from kedit_lightning.benchmark.quality import JUDGED_BY, judged
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.data.datamodule import EditDataModule, Split
from kedit_lightning.errors import NonFiniteError, UnsupportedUseError
from kedit_lightning.methods.method import EditMethod, as_edit_method
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.runs.output_folder import output_of
from kedit_lightning.runs.results import summary_of


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
        #: What the last sweep found, layer by layer.
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
        """Measure layer after layer; on several devices the first process does."""
        if not trainer.is_global_zero:
            return
        if any(tensor.numel() for tensor in method.state_dict().values()):
            raise UnsupportedUseError(
                f"what {type(method).__name__} has learned belongs to its own layers, so "
                "LayerSweep cannot move it to others; fit it anew for each choice of layers"
            )
        every = method.base.layout.dense_layers if self.layers is None else self.layers
        layers = list(dict.fromkeys(every))
        for layer in layers:
            method.base.layout.block(layer)  # one that does not exist is refused before any work
        self.found = []
        for layer in layers:
            entry = {"layer": layer, **measure(method.run, at_layer(method, layer), split)}
            self.found.append(entry)
            said = f"score {_shown(entry)}" if "error" not in entry else str(entry["error"])
            self.console.print(f"layer {layer}: {said}", highlight=False, markup=False)
        name = type(method).__name__
        self.console.print(self.table(f"{name}, layer by layer ({split})"))
        folder = output_of(method.run)
        if folder is not None:
            content = {"method": name, "best": self.best, "layers": self.found}
            folder.write_json("layer_sweep.json", content)

    @property
    def best(self) -> int | None:
        """Layer with the highest score, the first of several; ``None`` when nothing was scored."""
        scored = [entry for entry in self.found if entry.get("score") is not None]
        return max(scored, key=lambda entry: entry["score"])["layer"] if scored else None

    def table(self, title: str) -> Table:
        """What was found, the best layer marked.

        Args:
            title: What stands above.
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


def at_layer(method: Any, layer: int) -> Any:
    """The same method with the same settings, which edits one layer.

    Args:
        method: A method with the setting ``layer`` or ``layers``.
        layer: The layer.
    """
    settings = {key: value for key, value in method.hparams.items() if not key.startswith("_")}
    settings |= {"layer": layer} if "layer" in settings else {"layers": [layer]}
    return type(method)(base_model=method.base, **settings)


def measure(run: RunContext, method: EditMethod, split: Split) -> dict[str, Any]:
    """Run a split through a method under the protocol of a run; the stack is as before after it.

    Args:
        run: The run whose protocol, seed and data are used.
        method: The method.
        split: Name of the split.

    Returns:
        The shown scores, their harmonic mean as ``score``, and all scores with intervals as
        ``scores``; or the ``error`` with which the method refused to write.
    """
    assert isinstance(run.data, EditDataModule)
    parts = chunks(run.data.examples(split), run.protocol.chunk_size)
    # The edits of the sweep are no edits of the run.
    apart = RunContext(run.protocol, run.seed, run.data)
    runner = ProtocolRunner(method.base, method.edit, apart, split, method.edit_each)
    runner.chunks = len(parts)
    records: list[ExampleRecord] = []
    try:
        for index, part in enumerate(parts):
            records += runner.chunk(part, index)
        records += runner.finish()
    except NonFiniteError as error:  # no way to edit this layer; the others are still worth knowing
        return {"error": str(error)}
    finally:
        runner.close()
    scores = summary_of(records, run.protocol)["scores"]
    means = {key: entry["mean"] for key, entry in scores.items()}
    return {**judged(means), "scores": scores}


def _shown(entry: dict[str, Any], name: str = "score") -> str:
    value = entry.get(name)
    return "–" if value is None else f"{value:.3f}"
