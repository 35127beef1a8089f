"""Null space of key covariances (AlphaEdit, arXiv 2410.02355), with a cache of decompositions."""

from __future__ import annotations

import hashlib

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from kedit_lightning.cache_folder import cache_dir
from kedit_lightning.edits.edit_file import write_atomically

#: Width from which decompositions are cached on disk; a narrower one takes less than a second.
CACHED_WIDTH = 1024


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
    if not path.is_file():
        basis, values = _split(moment, energy, threshold)
        write_atomically(path, save({"basis": basis, "values": values}))
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("basis"), file.get_tensor("values")


def _split(moment: Tensor, energy: float, threshold: float | None) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    values = values.clamp(min=0)
    small = values.cumsum(0) <= energy * values.sum() if threshold is None else values < threshold
    return vectors[:, int(small.sum()) :].contiguous(), values
