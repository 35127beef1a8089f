"""Edits on disk: safetensors with a JSON header, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.state_schema import check_value
from kedit_lightning.errors import EditFileError

#: Versions: 1 has all of the header in the metadata; 2 has origin and values beside the tensors.
FORMAT_VERSION = 2
_HEADER = "kedit"
#: Name of the tensor that holds the bytes of a header too long for the metadata.
_BESIDE = "kedit/header"
#: Longest header in the metadata, in bytes; safetensors reads and writes no more than 100 MB.
_LONGEST = 1 << 20


class Header(TypedDict):
    """The JSON header of a saved edit."""

    format_version: Literal[1, 2]
    kind: str
    id: str
    origin: dict[str, Any]
    values: dict[str, Any]


def content_id(
    kind: str, values: Mapping[str, Any], origin: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> str:
    """Hash of an edit's content, by which equal edits are known in any process."""
    header = {"kind": kind, "values": values, "origin": origin}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


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
    """Write ``kind``, ``id``, ``origin`` and ``values`` of an edit, and its tensors, to a file.

    A long header, as that of many thousand requests, stands beside the tensors.
    """
    # Cloned, since safetensors refuses tensors that share memory, as layers with equal keys do.
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"format_version": 1, **header})
    if len(text) > _LONGEST:  # JSON of ASCII letters
        whole = json.dumps({"format_version": 2, **header}).encode()
        flat[_BESIDE] = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
        text = json.dumps({"format_version": 2, "beside": _BESIDE})
    write_atomically(path, save(flat, metadata={_HEADER: text}))
    return path


def read_edit(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """The header of a saved edit and its tensors, once the content has been found to be whole.

    Raises:
        EditFileError: The file is absent, no edit of a version this release reads, or its content
            is not what the id in its header says.
    """
    if not path.is_file():
        raise EditFileError(f"there is no saved edit at {path}")
    try:
        # This compares the sizes that the file declares with its length before it allocates any.
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Cloned into aligned memory: products round otherwise where a factor begins elsewhere.
            tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise EditFileError(f"{path} is no saved edit: {reason}") from error
    if _HEADER not in metadata:
        raise EditFileError(f"{path} holds tensors but is no saved edit: it has no kedit header")
    beside = tensors.pop(_BESIDE, None)
    if beside is None:
        header = _header(path, metadata[_HEADER])
    else:
        header = _header(path, beside.reshape(-1).view(torch.uint8).numpy().tobytes())
    if header["id"] != content_id(header["kind"], header["values"], header["origin"], tensors):
        raise EditFileError(
            f"{path} is damaged or was changed: its content is not that of the edit it names, "
            f"{reprlib.repr(header['id'])}; take it from a copy"
        )
    return header, tensors


def _header(path: Path, text: str | bytes) -> Header:
    try:
        header = json.loads(text)
        version = header.get("format_version", 0)
        json.dumps(header, ensure_ascii=False).encode()  # fails on text that is no Unicode
    except (ValueError, AttributeError, RecursionError) as error:
        raise EditFileError(f"{path} is no saved edit: its header cannot be read") from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise EditFileError(
            f"{path} has format version {version}, and this release reads up to {FORMAT_VERSION}; "
            "install a newer kedit-lightning"
        )
    try:
        check_value("its header", header, Header)
        check_value("its origin", header["origin"], EditOrigin)
    except EditFileError as error:
        raise EditFileError(f"{path} is no saved edit: {error}") from error
    whole: Header = header
    return whole
