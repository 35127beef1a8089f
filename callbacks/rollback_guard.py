"""Makes sure that a run leaves the base model as it found it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.fingerprint import checksum
from kedit_lightning.base_models.foreign_hooks import package_of
from kedit_lightning.benchmark import EditCallback
from kedit_lightning.edits.weight_storage import stored_tensors
from kedit_lightning.errors import article_list
from kedit_lightning.methods.method import as_edit_method


class RollbackGuard(EditCallback):
    """Fails loudly when the base model is not bit-equal after ``test``, ``edit`` or ``validate``.

    It compares checksums of all weights, the hooks of all modules, and the stack of edits.
    """

    def __init__(self) -> None:
        self._before: dict[str, Any] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the base model."""
        self._before = state_of(as_edit_method(pl_module).base)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the base model with what was remembered."""
        self._compare(as_edit_method(pl_module).base)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the base model, unless a hypernetwork is being fitted around it."""
        if trainer.state.fn == "validate":
            self._before = state_of(as_edit_method(pl_module).base)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the base model with what was remembered."""
        if trainer.state.fn == "validate":
            self._compare(as_edit_method(pl_module).base)

    def _compare(self, base: BaseModel) -> None:
        after = state_of(base)
        names = dict.fromkeys([*self._before, *after])
        changed = [name for name in names if self._before.get(name) != after.get(name)]
        if changed:
            shown = article_list(changed, 8)
            raise RuntimeError(
                f"base model '{base.name}' is not what it was before the run: {shown} differ, so "
                "its answers and all results after the first example are in doubt; this is a bug "
                "of the editing method or of kedit-lightning, please report it"
            )


def state_of(base: BaseModel) -> dict[str, Any]:
    """Checksums of weights, numbers of hooks and the stack of edits, by name.

    Args:
        base: The base model.
    """
    model: nn.Module = base.model
    found: dict[str, Any] = {
        f"weight '{name}'": checksum(tensor) for name, tensor in stored_tensors(model)
    }
    for name, module in model.named_modules():
        # transformers hooks a vision tower when its hidden states are first asked for.
        hooks = [
            hook
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if package_of(hook) != "transformers"
        ]
        if hooks:
            found[f"hooks of '{name}'"] = len(hooks)
    found["stack of edits"] = base.edits.ids
    return found
