"""Cache of key covariances.

A file is identified by base model, tokenizer, text, number of tokens, length of its rows, and
dtype.  They are in its name, and its header is checked when it is read.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from rich.progress import track

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.source_checkpoint import packaged_fingerprint
from kedit_lightning.base_models.spec import own_at_hand, resolve
from kedit_lightning.cache_folder import cache_dir
from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.projections import projection_shape
from kedit_lightning.errors import DataFileError, DataFileNotFoundError, article_list
from kedit_lightning.notices import bars_are_hidden
from kedit_lightning.statistics.covariance import SecondMoment
from kedit_lightning.statistics.key_collector import KeyCollector
from kedit_lightning.statistics.moment_file import MomentFile, Provenance, write_statistics

#: Source of an estimate from the text that comes with the package.
FEW_SAMPLE = "few-sample"
#: Relative standard error at which an estimate from few samples is good enough.
ENOUGH_ERROR = 0.05


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


def packaged_statistics(name: str) -> Path:
    """File of the statistics beside a base model of the project's own."""
    return Path(resolve(name)) / "statistics.safetensors"


def statistics_dir() -> Path:
    """Folder of the cache of statistics."""
    return cache_dir() / "statistics"


def find_statistics(base: BaseModel, module: str) -> KeyStatistics | None:
    """Covariance of a layer's keys, from the cache or the package: the one with most tokens.

    Statistics of the same weights in another precision serve.  An estimate from few samples is used
    only if there is no other.  A file that is damaged is left out with a warning.
    """
    found = [
        file
        for name in own_at_hand()
        for file in _readable([packaged_statistics(name)])
        if file.fits(base, packaged_fingerprint(name))
    ]
    cached = {
        path
        for weights in (base.weights_fingerprint, base.fingerprint)
        for path in statistics_dir().glob(f"{weights}-{base.tokenizer_fingerprint}-*.safetensors")
    }
    found += [file for file in _readable(sorted(cached)) if file.fits(base)]
    return _best(found, base, module)


def chosen_statistics(base: BaseModel, module: str, path: str | Path) -> KeyStatistics:
    """Covariance of a layer's keys from a file, or from a folder of files: that with most tokens.

    It may have been collected with another base model, which is said in a warning.

    Raises:
        DataFileNotFoundError: There is no such file or folder.
        DataFileError: The file is damaged, or nothing there fits the layer.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataFileNotFoundError(f"there are no key statistics at '{path}'")
    if path.suffix == ".npz":
        raise DataFileError(
            f"'{path}' is a file of the ROME code; import it once with `python -m "
            "kedit_lightning.statistics FILE.npz --base_model NAME`, and set statistics to auto or "
            "to the file that it writes"
        )
    whole = list(_readable(sorted(path.glob("*.safetensors")))) if path.is_dir() else []
    known = whole if path.is_dir() else [MomentFile(path)]
    with_layer = [file for file in known if module in file.layers]
    if not with_layer:
        layers = sorted({layer for file in known for layer in file.layers})
        raise DataFileError(
            f"'{path}' holds no key statistics of layer '{module}' (it has "
            f"{article_list(layers, 4) or 'none at all'}); name another file, or set statistics "
            "to auto"
        )
    ours = [file for file in with_layer if file.fits(base)]
    if not ours:
        warnings.warn(
            f"the key statistics in '{path}' were collected with another base model, tokenizer or "
            f"number type than '{base.name}'; they are used since statistics names them",
            stacklevel=2,
        )
    if path.is_file():
        return _read(with_layer[0], base, module)
    best = _best(ours or with_layer, base, module)
    if best is None:
        raise DataFileError(f"'{path}' holds only damaged key statistics of layer '{module}'")
    return best


def _readable(paths: Iterable[Path]) -> Iterator[MomentFile]:
    for path in paths:
        if path.is_file():
            try:
                yield MomentFile(path)
            except DataFileError as error:
                _leave_out(error)


def _best(files: Iterable[MomentFile], base: BaseModel, module: str) -> KeyStatistics | None:
    ranked = sorted(
        (file for file in files if module in file.layers),
        key=lambda file: (file.provenance.source != FEW_SAMPLE, file.count(module)),
        reverse=True,
    )
    # Only the best is loaded: a matrix takes as much memory as the layer's weight or more.
    for file in ranked:
        try:
            return _read(file, base, module)
        except DataFileError as error:
            _leave_out(error)
    return None


def _read(file: MomentFile, base: BaseModel, module: str) -> KeyStatistics:
    width = projection_shape(base.module(module))[0]
    return KeyStatistics(file.moment(module, width), file.provenance, file.path)


def _leave_out(error: DataFileError) -> None:
    warnings.warn(f"{error}; it is left out here", stacklevel=4)


def save_to_cache(collector: KeyCollector, source: str) -> Path:
    """Write the covariances of a pass over text to the cache; see :func:`write_statistics`."""
    read = {"max_tokens": collector.max_tokens, "texts": collector.texts, "split": True}
    provenance = Provenance.of(collector.base, collector.corpus, source, **read)
    path = statistics_dir() / provenance.file_name(collector.tokens)
    if any(isinstance(collector.base.module(name), ExpertProjection) for name in collector.modules):
        # Those of the experts of other blocks stand in files of their own.
        names = hashlib.sha256(" ".join(collector.modules).encode()).hexdigest()
        path = path.with_stem(f"{path.stem}-{names[:8]}")
    return write_statistics(path, collector.moments, provenance)


def few_sample_texts() -> list[str]:
    """The paragraphs of the small packaged text."""
    text = (files("kedit_lightning.statistics") / "few_sample.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]


def estimate_from_few_samples(
    base: BaseModel, modules: Sequence[str] | None = None, batch_size: int = 8
) -> Path:
    """Estimate covariances from the small packaged text and write them to the cache.

    They are those of all dense MLPs, or of all mixers where blocks are that alone, unless
    ``modules`` are given.

    It reads until there are 10 tokens a dimension and the relative standard error of every moment
    is below 5 %, or to the end of the text.
    """
    if modules is None:
        layout = base.layout
        blocks = [layout.mlp_block(layer) for layer in layout.mlp_layers]
        modules = [block.down for block in blocks if not block.is_routed]
    collector = KeyCollector(base, modules)
    texts = few_sample_texts()
    starts = range(0, len(texts), batch_size)
    hidden = bars_are_hidden()
    for start in track(starts, "Estimating key statistics", transient=True, disable=hidden):
        collector.read(texts[start : start + batch_size])
        if collector.is_within(ENOUGH_ERROR):
            break
    return save_to_cache(collector, FEW_SAMPLE)
