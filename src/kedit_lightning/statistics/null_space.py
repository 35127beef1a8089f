"""Directions in which typical keys lie, and their cache: to decompose a wide layer is slow."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from kedit_lightning.cache_folder import cache_dir
from kedit_lightning.edits.edit_file import write_atomically

#: Layers at least this wide are kept on disk; those of narrower ones are found in a second.
CACHED_WIDTH = 1024


def main_directions(
    moment: Tensor, energy: float, threshold: float | None = None
) -> tuple[Tensor, Tensor]:
    """Directions of keys that a change must avoid, and all eigenvalues.

    Args:
        moment: Second moment of keys. Shape ``[d, d]``, float64.
        energy: Share of its trace that may lie outside the directions.
        threshold: Smallest eigenvalue of the directions, instead of a share.

    Returns:
        Orthonormal columns, ``[d, r]``, and the eigenvalues in rising order, ``[d]``.
    """
    if len(moment) < CACHED_WIDTH:
        return _split(moment, energy, threshold)
    path = _place(moment, energy, threshold)
    if not path.is_file():
        basis, values = _split(moment, energy, threshold)
        write_atomically(path, save({"basis": basis, "values": values}))
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("basis"), file.get_tensor("values")


def _place(moment: Tensor, energy: float, threshold: float | None) -> Path:
    """File of a decomposition: its name is the content it was made from."""
    digest = hashlib.sha256(f"{energy} {threshold}".encode())
    digest.update(moment.contiguous().numpy().tobytes())
    return cache_dir() / "directions" / f"{digest.hexdigest()[:32]}.safetensors"


def _split(moment: Tensor, energy: float, threshold: float | None) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    values = values.clamp(min=0)
    if threshold is not None:
        free = int((values < threshold).sum())
    else:
        free = int((values.cumsum(0) <= energy * values.sum()).sum())
    return vectors[:, free:].contiguous(), values
