"""Edits on disk: safetensors with a JSON header, never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kedit_lightning.edits.edit import Edit, EditableModel, EditOrigin, edit_class
from kedit_lightning.errors import BaseModelMismatchError, EditFileError

FORMAT_VERSION = 1
_HEADER = "kedit"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there, even if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_edit(edit: Edit, path: Path) -> Path:
    """Write an edit; see :meth:`Edit.save`."""
    tensors, values = edit.state()
    header = {
        "format_version": FORMAT_VERSION,
        "kind": edit.kind,
        "id": edit.id,
        "origin": edit.origin.to_json(),
        "values": values,
    }
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


def load_edit(path: Path, base: EditableModel, force: bool) -> Edit:
    """Read an edit; see :meth:`Edit.load`."""
    header = read_header(path)
    try:
        origin = EditOrigin.from_json(header["origin"])
        if not force:
            check_same_base(f"the edit in {path}", origin, base)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return edit_class(header["kind"]).from_state(base, origin, tensors, header["values"])
    except (KeyError, TypeError) as error:
        raise EditFileError(
            f"{path} is no whole edit of kind '{header['kind']}' ({error!r}); save the edit again"
        ) from error


def check_same_base(what: str, origin: EditOrigin, base: EditableModel) -> None:
    """Refuse something that was made for another base model or tokenizer.

    Raises:
        BaseModelMismatchError: The message names both models.
    """
    for made, here, part in (
        (origin.fingerprint, base.fingerprint, "base model"),
        (origin.tokenizer_fingerprint, base.tokenizer_fingerprint, "tokenizer"),
    ):
        if made and made != here:
            raise BaseModelMismatchError(
                f"{what} was made for the {part} of '{origin.base_model}' (fingerprint {made}), "
                f"and this is '{base.name}' (fingerprint {here}); load that model, in the same "
                "dtype, or pass force=True if you know that they agree"
            )
