"""Saves edits as they are computed."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from kedit_lightning.benchmark import EditCallback
from kedit_lightning.edits import Edit
from kedit_lightning.methods.method import as_edit_method
from kedit_lightning.runs.output_folder import output_of


class EditSaver(EditCallback):
    """Saves each edit into the output folder as soon as it has been computed.

    Without an output folder (``--output``) it does nothing. At the end it writes ``stack.json``:
    the files in the order in which the edits are applied, with their hashes.
    """

    def on_edit(self, trainer: Trainer, method: LightningModule, name: str, edit: Edit) -> None:
        """Save an edit before it is scored, so that a crash does not lose it."""
        if (folder := output_of(as_edit_method(method).run)) is not None:
            folder.save_edit(name, edit)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the order of the edits."""
        method = as_edit_method(pl_module)
        folder = output_of(method.run)
        if folder is not None and trainer.is_global_zero:
            folder.write_stack(
                {
                    "base_model": method.base.name,
                    "fingerprint": method.base.fingerprint,
                    "method": type(method).__name__,
                    "mode": method.run.protocol.grouping,
                }
            )
