"""Import of published key covariances into the cache."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits.projections import find_module, is_projection, projection_shape
from kedit_lightning.errors import DataFileError, DataFileNotFoundError, UnsupportedUseError
from kedit_lightning.statistics.covariance import SecondMoment
from kedit_lightning.statistics.covariance_cache import Provenance, statistics_dir, write_statistics

#: ``transformer.h.17.mlp.c_proj_float32_mom2_100000.npz``: module, dtype, kind of statistic, length
#: cap in tokens if there was one, number of documents.
_NAME = re.compile(r"(?P<module>.+)_float\d+_mom2(?:_t(?P<cap>\d+))?(?:_\d+)?\.npz")


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
    total, count = _load(path)
    width = projection_shape(base.module(module))[0]
    if total.shape != (width, width):
        raise DataFileError(
            f"'{path}' holds a second moment of shape {list(total.shape)}, and the keys of "
            f"'{module}' of base model '{base.name}' have width {width}; name the model and layer "
            "it was made with"
        )
    largest = total.abs().max()  # not finite if an entry is not
    # Symmetric up to the rounding of float32 sums.
    symmetric = bool((total - total.T).abs().max() <= 1e-3 * largest)
    if not largest.isfinite() or count < 1 or not symmetric:
        raise DataFileError(
            f"'{path}' holds no second moment: it is not symmetric, not finite, or counts no keys "
            f"(count {count}); fetch the file again"
        )
    cap = int(named["cap"]) if named and named["cap"] else None
    with path.open("rb") as stream:
        corpus = hashlib.file_digest(stream, "sha256").hexdigest()
    provenance = Provenance.of(base, corpus, f"imported {path.name}", cap)
    moment = SecondMoment((total + total.T) / (2 * count), count)
    return write_statistics(
        statistics_dir() / provenance.file_name(count), {module: moment}, provenance
    )


def _load(path: Path) -> tuple[Tensor, int]:
    """The sum, in float64, and the number of keys."""
    if not path.is_file():
        raise DataFileNotFoundError(
            f"there is no file '{path}'; files of GPT-2 XL and GPT-J lie under "
            "https://rome.baulab.info/data/stats"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            prefix = "mom2." if "mom2.mom2" in arrays else ""
            total, count = arrays[f"{prefix}mom2"], arrays[f"{prefix}count"]
            return torch.from_numpy(np.asarray(total, dtype=np.float64)), int(count)
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataFileError(
            f"'{path}' holds no second moment in the format of the ROME code "
            f"({str(error) or type(error).__name__}); give a file with mom2.mom2 and mom2.count"
        ) from error
