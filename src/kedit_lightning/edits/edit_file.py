"""Edits on disk: safetensors with a JSON header, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kedit_lightning.errors import EditFileError

FORMAT_VERSION = 1
_HEADER = "kedit"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either whole or absent, even if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_edit(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write ``kind``, ``id``, ``origin`` and ``values`` of an edit, and its tensors, to a file."""
    header = {"format_version": FORMAT_VERSION, **header}
    # Cloned, since safetensors refuses tensors that share memory, as layers with equal keys do.
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(flat, metadata={_HEADER: json.dumps(header)}))
    return path


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a saved edit.

    Raises:
        EditFileError: The file is absent, or no edit of a version this release reads.
    """
    if not path.is_file():
        raise EditFileError(f"there is no saved edit at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise EditFileError(f"{path} is no saved edit: {error}") from error
    if _HEADER not in metadata:
        raise EditFileError(f"{path} holds tensors but is no saved edit: it has no kedit header")
    try:
        header: dict[str, Any] = json.loads(metadata[_HEADER])
        missing = {"format_version", "kind", "id", "origin", "values"} - header.keys()
    except (ValueError, AttributeError) as error:
        raise EditFileError(f"{path} is no saved edit: its header cannot be read") from error
    if missing:
        raise EditFileError(
            f"{path} is no saved edit: its header lacks {', '.join(sorted(missing))}"
        )
    if header["format_version"] > FORMAT_VERSION:
        raise EditFileError(
            f"{path} has format version {header['format_version']}, and this release reads up to "
            f"{FORMAT_VERSION}; install a newer kedit-lightning"
        )
    return header


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a saved edit, by name."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
