"""Learning curves of a fit, as a figure."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console

from kedit_lightning.analysis import figures
from kedit_lightning.analysis.learning_curve import Curve
from kedit_lightning.benchmark import EditCallback
from kedit_lightning.benchmark.quality import judged

_TRAIN, _VALIDATION = "train/", "val/"


class TrainingReport(EditCallback):
    """Draws the scalars that ``fit`` logs over its steps, as ``training.png``.

    It shows the losses, edit success and locality (in training, and on the validation split where
    there is one), the learning rates of the edits, and other scalars logged under ``train/``.
    It is written at the end of a fit, also of one that breaks off, and a resumed fit goes on where
    the first one stopped. A method that logs nothing gets no picture.

    Args:
        folder: Where the picture goes; beside the checkpoints if not given.
        console: Where the picture's path is shown; the terminal if not given.
    """

    def __init__(self, folder: str | Path | None = None, console: Console | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.console = console or Console()
        #: Curves by name; ``validation …`` are the headline scores of the validation split.
        self.curves: dict[str, Curve] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit, unless this one continues it."""
        if trainer.global_step == 0:
            self.curves = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the scalars of the step."""
        logged = {
            name.removeprefix(_TRAIN): value
            for name, value in trainer.callback_metrics.items()
            if name.startswith(_TRAIN)
        }
        if logged:
            # Fetched from the device together: one wait instead of one per scalar.
            values = torch.stack([value.detach().double() for value in logged.values()]).tolist()
            self._add(trainer, dict(zip(logged, values, strict=True)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the headline scores."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        scores = {
            name.removeprefix(_VALIDATION): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(_VALIDATION)
        }
        headline = judged(scores).items()
        self._add(trainer, {f"validation {k}": v for k, v in headline if v is not None})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw it."""
        path = self._draw(trainer, pl_module)
        if path is not None:
            self.console.print(f"training curves: {path}", highlight=False, markup=False)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Draw the curves of a fit that breaks off."""
        if trainer.state.fn == "fit":
            with suppress(OSError):  # the exception that stopped the fit is the one to be seen
                self._draw(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {"curves": {name: curve.state() for name, curve in self.curves.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of a fit that is resumed."""
        states = state_dict["curves"].items()
        self.curves = {name: Curve.from_state(state) for name, state in states}

    def _add(self, trainer: Trainer, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.curves.setdefault(name, Curve()).add(trainer.global_step, value)

    def _draw(self, trainer: Trainer, method: LightningModule) -> Path | None:
        if not self.curves or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        base: Any = getattr(method, "base", None)
        title = f"{type(method).__name__} on {getattr(base, 'name', 'its base model')}"
        path = (self.folder or _beside_checkpoints(trainer)) / "training.png"
        figures.draw_training(self.curves, path, f"{title}: fit")
        return path


def _beside_checkpoints(trainer: Trainer) -> Path:
    """Folder of a fit; the first process alone can tell, so the logger's is not asked for."""
    found = getattr(trainer.checkpoint_callback, "dirpath", None)
    if found is None:
        return Path(trainer.default_root_dir)
    kept = Path(found)
    return kept.parent if kept.name == "checkpoints" else kept
