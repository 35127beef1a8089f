"""Checkpoints of learned networks: reading them, the packaged ones, and making them small."""

from __future__ import annotations

import pickle
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from kedit_lightning.base_models import BaseModel
from kedit_lightning.errors import CheckpointError

#: Entries of a checkpoint that editing needs; the rest is there to go on with the training.
_LEARNED = (
    "state_dict",
    "hyper_parameters",
    "plan",
    "base_model",
    "pytorch-lightning_version",
    "epoch",
    "global_step",
)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of learned networks; nothing in it is ever run.

    Raises:
        CheckpointError: The file is absent, or holds no such networks.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint '{path}' does not exist (looked in {Path.cwd()}); name a file that "
            "`kedit fit` wrote, or leave the setting out"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"'{path}' is no checkpoint that can be read: {reason}") from error
    if not isinstance(checkpoint, dict) or "plan" not in checkpoint:
        raise CheckpointError(
            f"checkpoint '{path}' holds no learned network; name one that `kedit fit` wrote with a "
            "method of this kind"
        )
    return checkpoint


def packaged_checkpoint(name: str, base: BaseModel) -> dict[str, Any] | None:
    """The checkpoint that comes with a packaged base model, if it was fitted on this very model.

    Args:
        name: File name, such as ``mend.ckpt``.
        base: The base model to edit.
    """
    from kedit_lightning.base_models.spec import PACKAGED

    for model in PACKAGED:
        path = files("kedit_lightning.base_models") / model / name
        if not path.is_file():
            continue
        checkpoint = read_checkpoint(str(path))
        made = checkpoint["base_model"]
        if all(made[f] == getattr(base, f) for f in ("fingerprint", "tokenizer_fingerprint")):
            return checkpoint
    return None


def slim(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Keep what editing needs, and drop the state of the optimizer and of the loops."""
    return {key: checkpoint[key] for key in _LEARNED if key in checkpoint}
