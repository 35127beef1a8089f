"""Saves edits as they are computed."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from kedit_lightning.edits import Edit


class EditSaver(Callback):
    """Saves each edit into the output folder as soon as it has been computed.

    Without an output folder (``--output``) it does nothing. At the end it writes ``stack.json``:
    the files in the order in which the edits are applied, with their hashes.
    """

    def on_edit(self, trainer: Trainer, method: LightningModule, name: str, edit: Edit) -> None:
        """Save an edit before it is scored, so that a crash does not lose it."""
        folder = getattr(trainer, "output_folder", None)
        if folder is not None:
            folder.save_edit(name, edit)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the order of the edits."""
        folder = getattr(trainer, "output_folder", None)
        if folder is None or not trainer.is_global_zero:
            return
        base: Any = pl_module.base
        protocol: Any = getattr(trainer, "protocol", None)
        facts = {
            "base_model": base.name,
            "fingerprint": base.fingerprint,
            "method": type(pl_module).__name__,
            "mode": protocol.mode,
        }
        folder.write_stack(facts)
