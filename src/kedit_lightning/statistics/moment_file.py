"""Files of second moments: what they say of their origin, and what is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits.state_schema import check_value
from kedit_lightning.errors import DataFileError, EditFileError, NonFiniteError
from kedit_lightning.statistics.covariance import SecondMoment
from kedit_lightning.statistics.sealed_file import SealedFile, damage, write_sealed

#: Files of format 1 have no hashes of their content, and their longer texts were cut.
FORMAT_VERSION = 2
KIND = "kedit_statistics"


@dataclass(frozen=True)
class Provenance:
    """Origin of key covariances: model, tokenizer, text and dtype."""

    #: The weights of the base model they were collected with, in every precision and in that one;
    #: and others that are known to have the same keys.
    fingerprints: tuple[str, ...]
    tokenizer: str  # its fingerprint
    corpus: str  # hash of the text
    source: str  # description of the text
    max_tokens: int | None  # longest row of text, where that is known
    dtype: str  # in which the base model computed
    texts: int | None = None  # how many were read, where that is known
    split: bool = False  # whether longer texts were read in several rows; else they were cut

    @classmethod
    def of(cls, base: BaseModel, corpus: str, source: str, **read: Any) -> Provenance:
        """The provenance of covariances that are collected with a base model."""
        dtype = str(base.dtype).removeprefix("torch.")
        weights = tuple(dict.fromkeys((base.weights_fingerprint, base.fingerprint)))
        return cls(
            weights,
            base.tokenizer_fingerprint,
            corpus,
            source,
            read.pop("max_tokens", None),
            dtype,
            **read,
        )

    def file_name(self, tokens: int) -> str:
        """Name of the file in the cache.

        A text that was cut gives other tokens than one that was split, and so another name.
        """
        model = f"{self.fingerprints[0]}-{self.tokenizer}"
        rows = f"{'split' if self.split else 'cut'}-{self.max_tokens or 'unknown'}"
        return f"{model}-{self.corpus[:16]}-{tokens}-tokens-{rows}-{self.dtype}.safetensors"


class _Moments(TypedDict):
    format_version: Literal[1, 2]
    fingerprints: list[str]
    tokenizer: str
    corpus: str
    source: str
    max_tokens: int | None
    dtype: str
    counts: dict[str, int]
    errors: dict[str, float | None]


class _SplitMoments(_Moments):
    texts: int | None
    split: bool


def write_statistics(
    path: Path, moments: Mapping[str, SecondMoment], provenance: Provenance
) -> Path:
    """Write moments to a safetensors file, the means in float32.

    Raises:
        NonFiniteError: A moment holds NaN or infinity; nothing is written.
        CacheError: The file cannot be written.
    """
    for name, moment in moments.items():
        if not bool(torch.isfinite(moment.mean).all()):
            raise NonFiniteError(
                f"the keys of layer '{name}' are not finite, so their statistics were not kept; "
                "load the base model in bfloat16 or float32"
            )
    header = {
        "format_version": FORMAT_VERSION,
        **asdict(provenance),
        "counts": {name: moment.count for name, moment in moments.items()},
        "errors": {name: moment.error for name, moment in moments.items()},
    }
    means = {name: moment.mean.float() for name, moment in moments.items()}
    return write_sealed(path, KIND, header, means)


class MomentFile:
    """Second moments of layers in a file; a matrix is read when it is asked for.

    Raises:
        DataFileError: The file holds no statistics that this release reads, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._file = SealedFile(path, KIND)
        self.path, header = path, self._file.values
        version = header.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise DataFileError(
                f"{path} has format version {version}, and this release reads up to "
                f"{FORMAT_VERSION}; install a newer kedit-lightning"
            )
        sealed = version != 1
        try:
            check_value("its header", header, _SplitMoments if sealed else _Moments)
        except EditFileError as error:
            raise damage(path, str(error)) from error
        self._counts, self._errors = header["counts"], header["errors"]
        names = self._file.names
        whole = sealed == self._file.sealed and names == self._counts.keys() == self._errors.keys()
        if not (whole and all(_is_count(self._counts[n], self._errors[n]) for n in names)):
            raise damage(path, "its header does not fit its content")
        known = {name: header[name] for name in Provenance.__dataclass_fields__ if name in header}
        self.provenance = Provenance(**{**known, "fingerprints": tuple(header["fingerprints"])})

    @property
    def layers(self) -> frozenset[str]:
        """The layers that it has statistics of."""
        return self._file.names

    def count(self, layer: str) -> int:
        """Number of keys of a layer."""
        return int(self._counts[layer])

    def fits(self, base: BaseModel, *weights: str) -> bool:
        """Whether it was collected with a base model, or is of these weights, in any precision."""
        ours, known = {base.weights_fingerprint, base.fingerprint}, self.provenance.fingerprints
        return (
            not ours.isdisjoint((*known, *weights))
            and base.tokenizer_fingerprint == self.provenance.tokenizer
        )

    def moment(self, layer: str, width: int) -> SecondMoment:
        """The second moment of a layer whose keys have a width.

        Raises:
            DataFileError: The file is damaged there.
        """
        mean = self._file.tensor(layer)
        if not _is_moment(mean, width):
            raise damage(
                self.path, f"layer '{layer}' has no second moment of keys of width {width}"
            )
        return SecondMoment(mean.double(), self.count(layer), self._errors[layer])


def _is_count(count: object, error: object) -> bool:
    if type(count) is not int or not 0 < count < 1 << 62:
        return False
    return error is None or (type(error) in (int, float) and error >= 0 and isfinite(error))  # type: ignore[operator,arg-type]


def _is_moment(mean: Tensor, width: int) -> bool:
    if mean.dtype != torch.float32 or mean.shape != (width, width):
        return False
    diagonal = mean.diagonal()
    # Means of squares, whose sum is finite if all of them are; symmetric to the last bit.
    fine = bool((diagonal >= 0).all()) and bool(diagonal.double().sum().isfinite())
    return fine and torch.equal(mean, mean.T)
