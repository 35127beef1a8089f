"""Plain text, for covariances of keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from kedit_lightning.character_forms import is_unicode
from kedit_lightning.data import text as hub
from kedit_lightning.data.dataloader import BatchLoader, NoLoaders, process_rank
from kedit_lightning.data.record_files import json_lines
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import (
    DataFileError,
    DataFileNotFoundError,
    InvalidRequestError,
    UnsupportedUseError,
)


@dataclass
class TextBatch:
    """A batch of texts in Lightning's loops."""

    texts: list[str]

    def to(self, *args: Any, **kwargs: Any) -> TextBatch:
        """Return the batch itself; text has no device."""
        return self

    def __len__(self) -> int:
        return len(self.texts)


class Texts(LightningDataModule):
    """Plain text from a file, a folder or the Hugging Face hub, read as a stream.

    Of a ``.txt`` file, lines are joined to texts of at most ``max_chars`` characters. A ``.jsonl``
    file holds one text a line in ``text_column``. Longer texts and lines are split into several
    texts, and nothing is lost. A folder gives all its ``.txt`` and ``.jsonl`` files, those in
    folders below included, in alphabetical order.

    Args:
        path: File or folder with text.
        hub_name: Dataset of the Hugging Face hub, instead of ``path``.
        hub_config: Configuration of that dataset, where it has several.
        split: Split of that dataset.
        text_column: Field or column that holds the text.
        batch_size: Texts in a batch.
        max_chars: Characters after which a text is split.
        limit: Number of texts read, parts of longer ones included; all when absent.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        hub_name: str | None = None,
        hub_config: str | None = None,
        split: str = "train",
        text_column: str = "text",
        batch_size: int = 8,
        max_chars: int = 8192,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.hub_name = hub_name
        self.hub_config = hub_config
        self.split = split
        self.text_column = text_column
        self.batch_size = batch_size
        self.max_chars = max_chars
        self.limit = limit
        self._source: dict[str, Any] | None = None

    @property
    def source(self) -> dict[str, Any]:
        """Path or hub name, number and SHA-256 of the texts; of the hub's after a full pass."""
        self.setup()
        assert self._source is not None
        return dict(self._source)

    def setup(self, stage: str | None = None) -> None:
        """Check the settings, and count and hash local files."""
        if self._source is not None:
            return
        for name in ("batch_size", "max_chars", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UnsupportedUseError(f"{name} of Texts must be at least 1, got {value}")
        if (self.path is None) == (self.hub_name is None):
            given = "neither" if self.path is None else "both"
            raise UnsupportedUseError(
                f"Texts needs either path (a file or folder) or hub_name, and was given {given}: "
                "set one (--data.path FOLDER or --data.hub_name NAME on the command line)"
            )
        if self.path is None:
            name = "/".join(filter(None, [self.hub_name, self.hub_config, self.split]))
            self._source = {"hub": name, "sha256": None, "records": None}
        else:
            if not (records := sum(1 for _ in self.texts())):
                raise DataFileError(f"'{self.path}' holds no text; name another file or folder")
            sha256 = _hash_files(self._files())
            self._source = {"path": str(self.path), "sha256": sha256, "records": records}

    def texts(self) -> Iterator[str]:
        """All texts in order, up to ``limit``."""
        if self.path is not None:
            return islice(self._file_texts(), self.limit)
        source = hub.hub_texts(str(self.hub_name), self.hub_config, self.split, self.text_column)
        parts = (part for text in source for part in _split(text, self.max_chars))
        return islice(parts, self.limit)

    def train_dataloader(self) -> BatchLoader[TextBatch]:
        """Batches in the order of the source, dealt to the processes in turn.

        All processes get the same number of batches, since they wait for each other at every batch;
        those that the last round does not reach get a batch without texts.
        """
        source = self.source
        rank, world_size = process_rank()
        length = None
        if source["records"] is not None:
            batches = -(-source["records"] // self.batch_size)
            length = -(-batches // world_size)
        identity: dict[str, int | str] = {
            "data": str(source["sha256"] or source.get("hub")),
            "batch size": self.batch_size,
            "max_chars": self.max_chars,
            "text_column": self.text_column,
            "limit": str(self.limit),
            "processes": world_size,
        }
        # Lightning's loops fetch one batch ahead where the length is not known.
        ahead = int(length is None and self.trainer is not None)
        return BatchLoader(lambda epoch: self._share(rank, world_size), length, identity, ahead)

    def val_dataloader(self) -> NoLoaders:
        """No loaders: text has no requests to validate with."""
        return NoLoaders()

    def _share(self, rank: int, world_size: int) -> Iterator[TextBatch]:
        """One batch of each round, for one process."""
        batches = self._batches()
        while turn := list(islice(batches, world_size)):
            yield turn[rank] if rank < len(turn) else TextBatch([])

    def _batches(self) -> Iterator[TextBatch]:
        stream = self.texts()
        digest, count = hashlib.sha256(), 0
        while texts := list(islice(stream, self.batch_size)):
            for text in texts:
                digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
            count += len(texts)
            yield TextBatch(texts)
        if self._source is not None and self.path is None:
            self._source.update(sha256=digest.hexdigest(), records=count)

    # Sources -----------------------------------------------------------------------------------

    def _files(self) -> list[Path]:
        path = Path(str(self.path)).expanduser()
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl")]
            # Compared as text with one separator, so that all systems agree on the order.
            files = sorted(filter(Path.is_file, files), key=lambda file: file.as_posix())
            if not files:
                raise DataFileError(
                    f"folder '{path}' holds no .txt or .jsonl file; name one that does"
                )
            return files
        if not path.is_file():
            raise DataFileNotFoundError(
                f"text '{path}' does not exist (looked in {Path.cwd()}); correct path "
                "(--data.path FOLDER on the command line)"
            )
        if path.suffix not in (".txt", ".jsonl"):
            raise DataFileError(
                f"'{path}' is neither a .txt nor a .jsonl file; rename it if it is plain text"
            )
        return [path]

    def _file_texts(self) -> Iterator[str]:
        for file in self._files():
            try:
                with file.open(encoding="utf-8-sig") as lines:
                    if file.suffix == ".jsonl":
                        yield from self._jsonl(lines, file.name)
                    else:
                        yield from _pack(lines, self.max_chars)
            except UnicodeDecodeError as error:
                raise DataFileError(f"{file} is not UTF-8 text: {error.reason}") from error

    def _jsonl(self, lines: Iterator[str], name: str) -> Iterator[str]:
        for record in json_lines(lines, name):
            if record.problem is not None:
                raise DataFileError(f"{record.where} {record.problem}")
            values = record.values
            text = values.get(self.text_column) if isinstance(values, dict) else None
            if not isinstance(text, str):
                raise DataFileError(
                    f"{record.where}: field '{self.text_column}' must be text; name the "
                    "right field with text_column"
                )
            try:
                Fields(values)
            except InvalidRequestError as error:
                raise DataFileError(f"{record.where}: {error}") from error
            if not is_unicode(text):
                raise DataFileError(
                    f"{record.where}: field '{self.text_column}' holds halves of surrogate pairs, "
                    "which are no characters; take them out"
                )
            yield from _split(text, self.max_chars)


def _split(text: str, max_chars: int) -> Iterator[str]:
    """Parts of a text of at most ``max_chars``, all of it but parts that are blank."""
    parts = (text[start : start + max_chars] for start in range(0, len(text), max_chars))
    return filter(str.strip, parts)


def _pack(lines: Iterator[str], max_chars: int) -> Iterator[str]:
    """Join lines to texts of at most ``max_chars``; a longer line is split into several."""
    text = ""
    for line in lines:
        if len(text) + len(line) > max_chars:
            if text.strip():
                yield text
            text = ""
        while len(line) > max_chars:
            yield line[:max_chars]
            line = line[max_chars:]
        text += line
    if text.strip():
        yield text


def _hash_files(files: list[Path]) -> str:
    """SHA-256 over the content of files in order; where they lie does not matter."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
