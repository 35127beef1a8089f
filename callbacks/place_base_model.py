"""Moves the base model to the trainer's device."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from kedit_lightning.benchmark import EditCallback
from kedit_lightning.methods.method import as_edit_method


class PlaceBaseModel(EditCallback):
    """Moves the base model to the trainer's device before a run.

    A model that is quantised or has a device map stays where it is.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place it before a run, whichever the command is."""
        as_edit_method(pl_module).base.to(trainer.strategy.root_device)

    on_validation_start = on_test_start = on_predict_start = on_fit_start
