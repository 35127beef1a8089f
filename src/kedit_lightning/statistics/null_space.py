"""Null space of key covariances (AlphaEdit, arXiv 2410.02355), with a cache of decompositions."""

from __future__ import annotations

import hashlib
from contextlib import suppress

import torch
from torch import Tensor

from kedit_lightning.cache_folder import cache_dir
from kedit_lightning.errors import DataFileError
from kedit_lightning.statistics.sealed_file import SealedFile, write_sealed

#: Width from which decompositions are cached on disk; a narrower one takes less than a second.
CACHED_WIDTH = 1024
_KIND = "kedit_main_directions"


def main_directions(
    moment: Tensor, energy: float, threshold: float | None = None
) -> tuple[Tensor, Tensor]:
    """Orthogonal complement of the null space of a covariance, and all eigenvalues.

    A change of weights that these directions do not see leaves typical keys alone.

    Args:
        moment: Second moment of keys. Shape ``[d, d]``, float64.
        energy: Share of its trace that counts as the null space.
        threshold: Smallest eigenvalue outside the null space, instead of a share.

    Returns:
        Orthonormal columns, ``[d, r]``, and the eigenvalues in rising order, ``[d]``.
    """
    if len(moment) < CACHED_WIDTH:
        return _split(moment, energy, threshold)
    digest = hashlib.sha256(f"{energy} {threshold}".encode())
    digest.update(moment.contiguous().numpy().tobytes())
    path = cache_dir() / "directions" / f"{digest.hexdigest()[:32]}.safetensors"
    if path.is_file():
        # A damaged file is computed and written again.
        with suppress(DataFileError, KeyError):
            file = SealedFile(path, _KIND)
            if file.sealed:
                found = file.tensors()
                return found["basis"], found["values"]
    basis, values = _split(moment, energy, threshold)
    write_sealed(path, _KIND, {}, {"basis": basis, "values": values})
    return basis, values


def _split(moment: Tensor, energy: float, threshold: float | None) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    values = values.clamp(min=0)
    small = values.cumsum(0) <= energy * values.sum() if threshold is None else values < threshold
    return vectors[:, int(small.sum()) :].contiguous(), values
