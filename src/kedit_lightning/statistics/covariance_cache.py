"""Cache of key covariances.

A file is identified by base model, tokenizer, text, number of tokens, length at which texts were
cut, and dtype.  They are in its name, and its header is checked when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.spec import PACKAGED, resolve
from kedit_lightning.cache_folder import cache_dir
from kedit_lightning.edits.edit_file import write_atomically
from kedit_lightning.errors import NonFiniteError
from kedit_lightning.statistics.covariance import SecondMoment
from kedit_lightning.statistics.key_collector import KeyCollector

FORMAT_VERSION = 1
_HEADER = "kedit_statistics"
#: Source of an estimate from the text that comes with the package.
FEW_SAMPLE = "few-sample"
#: Relative standard error at which an estimate from few samples is good enough.
ENOUGH_ERROR = 0.05


@dataclass(frozen=True)
class Provenance:
    """Origin of key covariances: model, tokenizer, text and dtype."""

    #: The base model they were collected with, and others that are known to have the same keys.
    fingerprints: tuple[str, ...]
    tokenizer: str  # its fingerprint
    corpus: str  # hash of the text
    source: str  # description of the text
    max_tokens: int | None  # after which texts were cut, where that is known
    dtype: str  # in which the base model computed

    @classmethod
    def of(cls, base: BaseModel, corpus: str, source: str, max_tokens: int | None) -> Provenance:
        """The provenance of covariances that are collected with a base model."""
        dtype = str(base.dtype).removeprefix("torch.")
        tokenizer = base.tokenizer_fingerprint
        return cls((base.fingerprint,), tokenizer, corpus, source, max_tokens, dtype)

    def file_name(self, tokens: int) -> str:
        """Name of the file in the cache."""
        model = f"{self.fingerprints[0]}-{self.tokenizer}"
        text = f"{self.corpus[:16]}-{tokens}-tokens-cut-{self.max_tokens or 'unknown'}"
        return f"{model}-{text}-{self.dtype}.safetensors"


@dataclass(frozen=True)
class KeyStatistics:
    """Covariance of the keys of one layer, with its origin and the file it was read from."""

    moment: SecondMoment
    provenance: Provenance
    path: Path

    @property
    def is_few_sample(self) -> bool:
        """Whether it was estimated from the small packaged text."""
        return self.provenance.source == FEW_SAMPLE

    @property
    def note(self) -> str:
        """Source, hash, number of tokens and error bar, for reports."""
        origin, moment = self.provenance, self.moment
        bar = "" if moment.error is None else f", ± {100 * moment.error:.2g} %"
        return f"{origin.source} {origin.corpus[:8]} ({moment.count} tokens{bar})"


def write_statistics(
    path: Path, moments: Mapping[str, SecondMoment], provenance: Provenance
) -> Path:
    """Write moments to a safetensors file, the means in float32.

    Raises:
        NonFiniteError: A moment holds NaN or infinity; nothing is written.
    """
    for name, moment in moments.items():
        if not bool(torch.isfinite(moment.mean).all()):
            raise NonFiniteError(
                f"the keys of layer '{name}' are not finite, so their statistics were not kept; "
                "load the base model in bfloat16 or float32"
            )
    tensors = {name: moment.mean.float().contiguous() for name, moment in moments.items()}
    header = {
        "format_version": FORMAT_VERSION,
        **asdict(provenance),
        "counts": {name: moment.count for name, moment in moments.items()},
        "errors": {name: moment.error for name, moment in moments.items()},
    }
    write_atomically(path, save(tensors, metadata={_HEADER: json.dumps(header)}))
    return path


def read_header(path: Path) -> dict[str, Any]:
    """The header of a file of statistics; empty for a file of another kind or version."""
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return header if header.get("format_version") == FORMAT_VERSION else {}


def _matching(
    path: Path, module: str, base: BaseModel
) -> tuple[Provenance, int, float | None] | None:
    """Provenance, number of keys and error of a layer in a file; ``None`` for another model."""
    header = read_header(path)
    if module not in header.get("counts", {}):
        return None
    fields = {name: header[name] for name in Provenance.__dataclass_fields__}
    provenance = Provenance(**{**fields, "fingerprints": tuple(fields["fingerprints"])})
    ours = base.fingerprint in provenance.fingerprints
    ours = ours and base.tokenizer_fingerprint == provenance.tokenizer
    return (provenance, int(header["counts"][module]), header["errors"][module]) if ours else None


def packaged_statistics(name: str) -> Path:
    """File of the statistics of a packaged base model."""
    return Path(resolve(name)) / "statistics.safetensors"


def statistics_dir() -> Path:
    """Folder of the cache of statistics."""
    return cache_dir() / "statistics"


def find_statistics(base: BaseModel, module: str) -> KeyStatistics | None:
    """Covariance of a layer's keys, from the cache or the package: the one with most tokens.

    An estimate from few samples is used only if there is no other.
    """
    places = [packaged_statistics(name) for name in PACKAGED]
    prefix = f"{base.fingerprint}-{base.tokenizer_fingerprint}-"
    places += sorted(statistics_dir().glob(f"{prefix}*.safetensors"))
    found = [
        (path, *match)
        for path in places
        if path.is_file() and (match := _matching(path, module, base)) is not None
    ]
    if not found:
        return None
    # Only the best is loaded: a matrix takes as much memory as the layer's weight or more.
    path, provenance, count, error = max(
        found, key=lambda match: (match[1].source != FEW_SAMPLE, match[2])
    )
    with safe_open(path, framework="pt") as file:
        mean = file.get_tensor(module).double()
    return KeyStatistics(SecondMoment(mean, count, error), provenance, path)


def save_to_cache(collector: KeyCollector, source: str) -> Path:
    """Write the covariances of a pass over text to the cache; see :func:`write_statistics`."""
    provenance = Provenance.of(collector.base, collector.corpus, source, collector.max_tokens)
    path = statistics_dir() / provenance.file_name(collector.tokens)
    return write_statistics(path, collector.moments, provenance)


def few_sample_texts() -> list[str]:
    """The paragraphs of the small packaged text."""
    text = (files("kedit_lightning.statistics") / "few_sample.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]


def estimate_from_few_samples(base: BaseModel, batch_size: int = 8) -> Path:
    """Estimate covariances of all layers from the small packaged text and write them to the cache.

    It reads until there are 10 tokens a dimension and the relative standard error of every moment
    is below 5 %, or to the end of the text.
    """
    collector = KeyCollector(base, [block.down for block in base.layout.dense_blocks])
    texts = few_sample_texts()
    starts = range(0, len(texts), batch_size)
    for start in track(starts, description="Estimating key statistics", transient=True):
        collector.read(texts[start : start + batch_size])
        if collector.is_within(ENOUGH_ERROR):
            break
    return save_to_cache(collector, FEW_SAMPLE)
