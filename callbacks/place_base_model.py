"""Puts the base model where the trainer computes."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class PlaceBaseModel(Callback):
    """Moves the base model to the trainer's device before anything is asked of it.

    A model that is quantised or has a device map stays where it is.
    """

    def _place(self, trainer: Trainer, pl_module: LightningModule) -> None:
        base = getattr(pl_module, "base", None)
        if base is not None:
            base.to(trainer.strategy.root_device)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place it before a fit."""
        self._place(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place it before a validation."""
        self._place(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place it before a test or an edit."""
        self._place(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place it before a prediction."""
        self._place(trainer, pl_module)
