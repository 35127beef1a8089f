"""A temporary file that tensors wait in until they are needed."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.errors import TemporaryFileError

#: Bytes up to which the file is held in memory.
IN_MEMORY = 2**23


@dataclass(frozen=True)
class Kept:
    """A tensor in a file.

    Args:
        start: Where it starts.
        shape: Its shape.
        dtype: Its number type.
        device: Where it came from, and is given back.
    """

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class TensorFile:
    """Keeps tensors out of memory, bit for bit, once they are more than :data:`IN_MEMORY` bytes.

    The file lies in the folder of temporary files (``TMPDIR``), has no name there where the system
    allows that, and is gone when the ``with`` block ends.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 - in __exit__

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def put(self, tensor: Tensor) -> Kept:
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
        return Kept(start, plain.shape, plain.dtype, tensor.device)

    def get(self, kept: Kept) -> Tensor:
        """A tensor that was added, on the device it came from."""
        found = torch.empty(kept.shape, dtype=kept.dtype)
        self._file.seek(kept.start)
        self._file.readinto(found.view(torch.uint8).numpy().data)
        return found.to(kept.device)
