"""A temporary file of tensors."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.errors import TemporaryFileError

#: Bytes up to which the file stays in memory.
IN_MEMORY = 2**23


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its byte offset, shape, dtype and original device."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class TensorFile:
    """Stores tensors bit for bit, on disk once they are more than :data:`IN_MEMORY` bytes.

    The file is in the folder of temporary files (``TMPDIR``), without a name where the system
    allows that, and is deleted when the ``with`` block ends.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 - in __exit__

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def put(self, tensor: Tensor) -> StoredTensor:
        """Add a tensor to the file.

        Raises:
            TemporaryFileError: There is no space for it.
        """
        plain = tensor.detach().cpu().contiguous()
        try:
            start = self._file.seek(0, io.SEEK_END)
            self._file.write(plain.view(torch.uint8).numpy().data)
        except OSError as error:
            raise TemporaryFileError(
                f"rows that wait for the solve cannot be written to a temporary file ({error}); "
                "set TMPDIR to a folder with more space, or write fewer facts at a time"
            ) from error
        return StoredTensor(start, plain.shape, plain.dtype, tensor.device)

    def get(self, stored: StoredTensor) -> Tensor:
        """Read a tensor back, onto the device it came from."""
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self._file.seek(stored.start)
        self._file.readinto(tensor.view(torch.uint8).numpy().data)
        return tensor.to(stored.device)
