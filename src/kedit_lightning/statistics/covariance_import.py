"""Import of published key covariances into the cache."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits.projections import find_module, is_projection, projection_shape
from kedit_lightning.errors import DataFileError, DataFileNotFoundError, UnsupportedUseError
from kedit_lightning.statistics.covariance import SecondMoment
from kedit_lightning.statistics.covariance_cache import statistics_dir
from kedit_lightning.statistics.moment_file import Provenance, write_statistics

#: ``transformer.h.17.mlp.c_proj_float32_mom2_100000.npz``: module, dtype, kind of statistic, length
#: cap in tokens if there was one, number of documents.
_NAME = re.compile(r"(?P<module>.+)_float\d+_mom2(?:_t(?P<cap>\d+))?(?:_\d+)?\.npz")

#: An array's header in a file of numpy, and a count with what surrounds it, take less.
_HEADER_BYTES = 4096
_COUNT_BYTES = 64
#: Rows that are computed together in float64.
_ROWS = 512


def import_second_moment(path: str | Path, base: BaseModel, module: str | None = None) -> Path:
    """Import a second moment in the format of the ROME and MEMIT code into the cache.

    The files at rome.baulab.info/data/stats are written by ``util/runningstats.py`` of
    github.com/kmeng01/rome: a ``CombinedStat`` of one ``SecondMoment`` saved with ``numpy.savez``.
    They hold ``mom2.mom2``, the *sum* of ``k kᵀ`` over tokens (float32, ``[d_in, d_in]``, every
    entry computed), ``mom2.count``, the number of tokens, the name of the class in
    ``mom2.constructor``, and the number of documents in ``sample_size``.  A ``SecondMoment`` saved
    on its own has the same names without ``mom2.``.  A file does not name its model, so only the
    width of the module can be checked; the caller must name the right base model.  The keys are
    inputs of ``module``, by default that of the file's name.  Returns the cached file.

    Raises:
        DataFileError: The file has another format, or does not fit the module.
        UnsupportedUseError: The module is not known, or the file's name says another one.
    """
    path = Path(path).expanduser()
    named = _NAME.fullmatch(path.name)
    if named and module not in (None, named["module"]):
        raise UnsupportedUseError(
            f"the name of '{path.name}' says that its keys belong to '{named['module']}', and "
            f"'{module}' was asked for; leave the layer out, or rename the file"
        )
    module = named["module"] if named else module
    if module is None:
        raise UnsupportedUseError(
            f"the name of '{path.name}' does not say which module its keys belong to; name it "
            "(module=..., or --layer on the command line)"
        )
    if not is_projection(find_module(base.model, module)):
        raise UnsupportedUseError(
            f"module '{module}' of '{base.name}' is no Linear or Conv1D, so it has no keys; name "
            "the projection that leaves an MLP"
        )
    width = projection_shape(base.module(module))[0]
    total, count = _load(path, module, width, base.name)
    mean = _mean(total, count)
    if mean is None:
        raise DataFileError(
            f"'{path}' holds no second moment: it is not symmetric, not finite, or counts no keys "
            f"(count {count}); fetch the file again"
        )
    cap = int(named["cap"]) if named and named["cap"] else None
    with path.open("rb") as stream:
        corpus = hashlib.file_digest(stream, "sha256").hexdigest()
    provenance = Provenance.of(base, corpus, f"imported {path.name}", max_tokens=cap)
    return write_statistics(
        statistics_dir() / provenance.file_name(count),
        {module: SecondMoment(mean, count)},
        provenance,
    )


def _load(path: Path, module: str, width: int, base: str) -> tuple[NDArray[Any], int]:
    """The sum of ``k kᵀ``, ``[width, width]``, and the number of keys."""
    if not path.is_file():
        raise DataFileNotFoundError(
            f"there is no file '{path}'; files of GPT-2 XL and GPT-J lie under "
            "https://rome.baulab.info/data/stats"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            prefix = "mom2." if "mom2.mom2.npy" in archive.namelist() else ""
            count = _member(archive, f"{prefix}count", _COUNT_BYTES)
            if count.shape or count.dtype.kind not in "iuf" or not float(count).is_integer():
                raise ValueError(f"the count is {str(count)[:40]}")
            total = _member(archive, f"{prefix}mom2", 8 * width**2)
    except Exception as error:  # a damaged archive fails in many ways
        reason = (str(error) or type(error).__name__).partition("\n")[0][:200]
        raise DataFileError(
            f"'{path}' holds no second moment in the format of the ROME code of keys that are "
            f"{width} wide, as those of '{module}' of base model '{base}' are ({reason}); give a "
            "file of that model with mom2.mom2 and mom2.count"
        ) from error
    if total.shape != (width, width) or total.dtype.kind != "f":
        raise DataFileError(
            f"'{path}' holds a second moment of shape {list(total.shape)} and type {total.dtype}, "
            f"and the keys of '{module}' of base model '{base}' have width {width}; name the model "
            "and layer it was made with"
        )
    return total, int(count)


def _member(archive: zipfile.ZipFile, name: str, most: int) -> NDArray[Any]:
    """An array of an ``.npz`` file, read without copies once its size has been found to be right.

    Raises:
        ValueError: It declares more than ``most`` bytes, or Python objects.
    """
    entry = archive.getinfo(f"{name}.npy")
    if entry.file_size > most + _HEADER_BYTES:
        raise ValueError(f"{name} has {entry.file_size} bytes, more than such a moment needs")
    raw = archive.read(entry)
    stream = io.BytesIO(raw)
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = read[version](stream, max_header_size=_HEADER_BYTES)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which allow_pickle=False refuses")
    # The order of rows and columns does not matter to a symmetric matrix.
    return np.frombuffer(raw, dtype, offset=stream.tell()).reshape(shape)


def _mean(total: NDArray[Any], count: int) -> Tensor | None:
    """The symmetric mean ``[d, d]`` in float32; ``None`` if the sum is that of no second moment."""
    if not 0 < count < 1 << 62:
        return None
    mean = torch.empty(total.shape, dtype=torch.float32)
    largest = float(np.abs(total).max())
    for start in range(0, len(total), _ROWS):
        rows = slice(start, start + _ROWS)
        here, there = (np.asarray(part, np.float64) for part in (total[rows], total[:, rows].T))
        # Symmetric up to the rounding of float32 sums.
        if not np.abs(here - there).max() <= 1e-3 * largest < np.inf:
            return None
        mean[rows] = torch.from_numpy((here + there) / (2 * count))
    return mean if bool((mean.diagonal() >= 0).all()) else None
