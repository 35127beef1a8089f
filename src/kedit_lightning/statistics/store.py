"""Where key statistics are kept and found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.cache import cache_dir
from kedit_lightning.base_models.spec import PACKAGED, resolve
from kedit_lightning.edits.files import write_atomically
from kedit_lightning.statistics.collect import KeyCollector
from kedit_lightning.statistics.moments import SecondMoment

#: Name of the corpus that comes with the package.
FEW_SAMPLE = "few-sample"


@dataclass(frozen=True)
class KeyStatistics:
    """Second moment of the keys of one layer, and where it comes from.

    Args:
        moment: The moment.
        corpus: Name or hash of the text it was collected from.
        path: The file it was read from.
    """

    moment: SecondMoment
    corpus: str
    path: Path

    @property
    def is_few_sample(self) -> bool:
        """Whether it was estimated from the small packaged text."""
        return self.corpus == FEW_SAMPLE


def write_statistics(
    path: Path, moments: Mapping[str, SecondMoment], corpus: str, fingerprints: list[str]
) -> Path:
    """Write moments to a safetensors file, the means in float32."""
    tensors = {name: moment.mean.float().contiguous() for name, moment in moments.items()}
    header = {
        "corpus": corpus,
        "fingerprints": fingerprints,
        "counts": {name: moment.count for name, moment in moments.items()},
    }
    write_atomically(path, save(tensors, metadata={"kedit_statistics": json.dumps(header)}))
    return path


def _read(path: Path, module: str, fingerprint: str) -> KeyStatistics | None:
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("kedit_statistics", "{}"))
        if fingerprint not in header.get("fingerprints", []) or module not in header["counts"]:
            return None
        count = int(header["counts"][module])
        mean = file.get_tensor(module).double()
    return KeyStatistics(SecondMoment(mean * count, count), header["corpus"], path)


def packaged_statistics(name: str) -> Path:
    """Where the statistics of a packaged base model lie."""
    return Path(resolve(name)) / "statistics.safetensors"


def _folder(base: BaseModel) -> Path:
    return cache_dir() / "statistics" / base.fingerprint


def find_statistics(base: BaseModel, module: str) -> KeyStatistics | None:
    """The statistics of a layer with most tokens, from the cache or the package."""
    places = [packaged_statistics(name) for name in PACKAGED]
    places += sorted(_folder(base).glob("*.safetensors"))
    found = [
        statistics
        for path in places
        if path.is_file() and (statistics := _read(path, module, base.fingerprint)) is not None
    ]
    return max(found, key=lambda statistics: statistics.moment.count, default=None)


def save_to_cache(base: BaseModel, collector: KeyCollector, corpus: str) -> Path:
    """Keep what a pass over text has collected."""
    name = f"{corpus[:16]}-{collector.tokens}-{collector.max_tokens}.safetensors"
    return write_statistics(_folder(base) / name, collector.moments, corpus, [base.fingerprint])


def few_sample_texts() -> list[str]:
    """The paragraphs of the small packaged text."""
    text = (files("kedit_lightning.statistics") / "few_sample.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]


def estimate_from_few_samples(base: BaseModel, batch_size: int = 8) -> Path:
    """Collect statistics of all layers from the small packaged text and keep them."""
    from rich.progress import track

    modules = [block.down for block in base.layout.dense_blocks]
    collector = KeyCollector(base, modules)
    texts = few_sample_texts()
    starts = range(0, len(texts), batch_size)
    for start in track(starts, description="Estimating key statistics", transient=True):
        collector.read(texts[start : start + batch_size])
    return save_to_cache(base, collector, FEW_SAMPLE)


__all__ = [
    "FEW_SAMPLE",
    "KeyStatistics",
    "estimate_from_few_samples",
    "find_statistics",
    "packaged_statistics",
    "save_to_cache",
    "write_statistics",
]
