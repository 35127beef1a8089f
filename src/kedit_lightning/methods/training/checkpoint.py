"""Checkpoints of trained networks: loading, the packaged ones, checks, and slimming."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.source_checkpoint import packaged_fingerprint
from kedit_lightning.base_models.spec import own_at_hand, resolve
from kedit_lightning.errors import BaseModelMismatchError, CheckpointError

_FINGERPRINTS = ("fingerprint", "tokenizer_fingerprint")
#: Entries of a checkpoint that editing needs; the rest resumes the training.
_NEEDED_TO_EDIT = (
    "state_dict",
    "hyper_parameters",
    "plan",
    "base_model",
    "pytorch-lightning_version",
    "epoch",
    "global_step",
)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of trained networks onto the CPU; no code in it is executed.

    Raises:
        CheckpointError: The file is absent, or holds no such networks.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint '{path}' does not exist (looked in {Path.cwd()}); name a file that "
            "`kedit fit` wrote, or leave the setting out"
        )
    checkpoint = load_checkpoint(path)
    if "plan" not in checkpoint:
        raise CheckpointError(
            f"checkpoint '{path}' holds no learned network; name one that `kedit fit` wrote with a "
            "method of this kind"
        )
    return checkpoint


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of a fit onto the CPU, once it has been found to be whole.

    Raises:
        CheckpointError: The file is damaged, or no checkpoint that ``fit`` wrote.
    """
    way_out = "take it from a copy, or name another file that `kedit fit` wrote"
    try:
        with ZipFile(path) as archive:
            # torch itself does not compare the sums that it writes.
            if (damaged := archive.testzip()) is not None:
                raise CheckpointError(f"'{path}' is damaged (in its part {damaged}); {way_out}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zip files and pickles are damaged in many ways
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"'{path}' is no checkpoint that can be read: {reason}; {way_out}"
        ) from error
    problem = _problem(checkpoint)
    if problem:
        raise CheckpointError(f"'{path}' is no checkpoint of a method: {problem}; {way_out}")
    whole: dict[str, Any] = checkpoint
    return whole


def _problem(checkpoint: object) -> str:
    """What keeps a loaded object from being a checkpoint of a method; empty if nothing does."""
    if not isinstance(checkpoint, dict):
        return f"it holds a {type(checkpoint).__name__}"
    for name in ("state_dict", "hyper_parameters", "base_model", "plan"):
        if not isinstance(checkpoint.get(name, {} if name == "plan" else None), dict):
            return f"its '{name}' is {reprlib.repr(checkpoint.get(name, 'absent'))}"
    if not isinstance(checkpoint["hyper_parameters"].get("_class_path"), str):
        return "its 'hyper_parameters' name no method"
    named = [checkpoint["base_model"].get(n) for n in ("name", *_FINGERPRINTS)]
    if not all(isinstance(value, str) for value in named):
        return "its 'base_model' lacks name or fingerprint"
    strange = [n for n, t in checkpoint["state_dict"].items() if not isinstance(t, Tensor)]
    return f"'{strange[0]}' is no tensor" if strange else ""


def packaged_checkpoint(name: str, base: BaseModel) -> dict[str, Any] | None:
    """The checkpoint, such as ``mend.ckpt``, that stands beside this base model, if any.

    It serves the packaged weights in every precision.
    """
    for model in own_at_hand():
        path = Path(resolve(model)) / name
        if not path.is_file():
            continue
        checkpoint = read_checkpoint(str(path))
        fitted_on = checkpoint["base_model"]
        fitted_on["weights_fingerprint"] = packaged_fingerprint(model)
        weights = ("weights_fingerprint", "fingerprint")
        same = any(fitted_on[name] == getattr(base, name) for name in weights)
        if same and fitted_on["tokenizer_fingerprint"] == base.tokenizer_fingerprint:
            return checkpoint
    return None


def check_fitted_with(checkpoint: dict[str, Any], method: str, source: str) -> None:
    """Make sure that a checkpoint, called ``source`` in messages, is of a method.

    Raises:
        CheckpointError: It was fitted with another method.
    """
    fitted_with = checkpoint["hyper_parameters"]["_class_path"].rpartition(".")[2]
    if fitted_with != method:
        raise CheckpointError(
            f"checkpoint {source} was fitted with {fitted_with}, not {method}; name one of this "
            "method"
        )


def check_shapes(checkpoint: dict[str, Any], state: Mapping[str, Tensor], base_model: str) -> None:
    """Make sure that the tensors of a checkpoint fit the state of networks for a base model.

    Raises:
        BaseModelMismatchError: The base model has other shapes than the checkpoint's.
    """
    for name, tensor in state.items():
        saved = checkpoint["state_dict"].get(f"network.{name}")
        if saved is None or saved.shape != tensor.shape:
            raise BaseModelMismatchError(
                f"the checkpoint was fitted on base model '{checkpoint['base_model']['name']}', "
                f"whose projections have other shapes than those of '{base_model}' ('{name}' does "
                "not fit); fit again"
            )


def slim(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Keep the entries that editing needs; drop the state of the optimizer and of the loops."""
    return {key: checkpoint[key] for key in _NEEDED_TO_EDIT if key in checkpoint}
