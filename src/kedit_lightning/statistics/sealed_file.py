"""Files of the cache whose content is checked when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from kedit_lightning.edits.edit_file import write_atomically
from kedit_lightning.errors import CacheError, DataFileError

_SEAL = "seal"
_DIGESTS = "digests"


def tensor_digest(tensor: Tensor) -> str:
    """Hash of a tensor's shape, dtype and content."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_sealed(
    path: Path, kind: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Path:
    """Write tensors and plain values to a safetensors file, with hashes of both.

    Raises:
        CacheError: The file cannot be written.
    """
    # Cloned, since safetensors refuses tensors that share memory.
    flat, seen = {}, set[int]()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        flat[name] = whole.clone() if whole.data_ptr() in seen else whole
        seen.add(whole.data_ptr())
    digests = {name: tensor_digest(tensor) for name, tensor in flat.items()}
    header = {**values, _DIGESTS: digests}
    # One entry, since safetensors writes several in any order.
    text = json.dumps({**header, _SEAL: _seal(header)})
    try:
        write_atomically(path, save(flat, metadata={kind: text}))
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written ({error.strerror or error}); make room, or name another "
            "folder for the cache in KEDIT_CACHE"
        ) from error
    return path


class SealedFile:
    """A file that :func:`write_sealed` wrote; ``values`` are whole if it has a seal.

    Args:
        path: The file.
        kind: What :func:`write_sealed` was told.

    Raises:
        DataFileError: It is of another kind, or its header is damaged.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        try:
            # This compares the sizes that the file declares with its length.
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                #: Names of the tensors.
                self.names = frozenset(file.keys())
            values = dict(json.loads(metadata[kind]))
            seal = values.pop(_SEAL, None)
            whole = seal is None or seal == _seal(values)
        except KeyError as error:
            raise DataFileError(f"{path} holds no {kind.replace('_', ' ')}") from error
        except Exception as error:  # the libraries raise many kinds
            raise damage(path, _reason(error)) from error
        #: Whether the file has hashes at all; those of earlier releases have none.
        self.sealed = seal is not None
        if not whole:
            raise damage(path, "its header is not the one that was written")
        self._digests: dict[str, Any] = values.pop(_DIGESTS) if self.sealed else {}
        self.values: dict[str, Any] = values

    def tensor(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            DataFileError: It is absent, or not the one that was written.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except Exception as error:
            raise damage(self.path, _reason(error)) from error
        if self.sealed and tensor_digest(tensor) != self._digests.get(name):
            raise damage(self.path, f"'{name}' is not what was written")
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; see :meth:`tensor`."""
        return {name: self.tensor(name) for name in sorted(self.names)}


def _seal(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def damage(path: Path, reason: str) -> DataFileError:
    """The error that names a damaged file and the way out."""
    return DataFileError(f"{path} is damaged ({reason}); delete it and collect or fetch it again")


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__
