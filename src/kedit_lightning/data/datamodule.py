"""Base class of the datasets of edits: file reading, validation, error reports and loaders."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from kedit_lightning.character_forms import spans_of
from kedit_lightning.data.complaints import (
    SHOWN,
    SHOWN_OF_FOREIGN,
    Complaint,
    contradictory,
    listed,
    lost_subjects,
    unread_fields,
)
from kedit_lightning.data.dataloader import (
    BatchLoader,
    NoLoaders,
    evaluation_chunks,
    process_rank,
    training_chunks,
)
from kedit_lightning.data.file_formats import advice
from kedit_lightning.data.locality_set import locality_set, with_locality
from kedit_lightning.data.picture_workers import with_pictures
from kedit_lightning.data.record_parsing import Parsed, parsed
from kedit_lightning.data.record_sources import read_source
from kedit_lightning.data.records import Fields, Record
from kedit_lightning.data.splits import LoadedSplit
from kedit_lightning.errors import (
    DataFileError,
    DataFileNotFoundError,
    UnsupportedUseError,
)
from kedit_lightning.requests import EditBatch, EditExample, trimmed_texts
from kedit_lightning.run_seed import run_seed

Split: TypeAlias = Literal["train", "validation", "test"]

_OPTION: dict[Split, str] = {"train": "train_path", "validation": "val_path", "test": "path"}


class EditDataModule(LightningDataModule, ABC):
    """Base class of datasets of edits.

    A dataset implements :meth:`parse`, which turns one record of its file into an example.  File
    formats, error reports, limits and loaders are the same for all.

    Args:
        path: File with the facts to edit and test: a JSON list, JSON Lines or CSV; a folder of such
            files; or a file of the hub, hf://datasets/OWNER/NAME@REVISION/FILE.
        limit: Number of records kept of each split, behind which its file is not read; all when
            absent.
        on_bad_record: ``error`` reports all records that do not fit and stops; ``skip`` leaves
            them out, and counts and lists them in the results.
        train_path: File with the facts that ``fit`` learns from.
        val_path: File with the facts of ``validate``, also used during ``fit``.
        seed: Fixes the order of training; the seed of the run when absent.
        locality_path: File of NQ-open or PIQA whose questions, or text file whose passages, become
            further locality probes of the records to test.
        locality_probes: How many of them each record gets, in turn.
        num_workers: Processes that open the pictures of records ahead of their use.
    """

    id_field: ClassVar[str | None] = None
    """Field that names a record; without it records are named by their position, from zero."""
    known_fields: ClassVar[frozenset[str] | None] = None
    """All fields a record may have, where a dataset's schema is closed; others are reported."""
    where_to_get_it: ClassVar[str] = ""
    """Ends the message that says that no file was named."""

    chunk_size: int = 1
    """Examples of a chunk while evaluating; the method sets it as its protocol says."""
    deals_out_chunks: bool = True
    """Whether each process evaluates chunks of its own; in sequential runs all see all chunks, as
    each edit is computed on the ones before it."""
    order: int = 0
    """Number of a permutation of the examples to test, which the seed of the run draws; 0 is the
    order of the file."""

    def __init__(
        self,
        path: str | Path | None = None,
        limit: int | None = None,
        on_bad_record: Literal["error", "skip"] = "error",
        train_path: str | Path | None = None,
        val_path: str | Path | None = None,
        seed: int | None = None,
        locality_path: str | Path | None = None,
        locality_probes: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.path = path
        self.limit = limit
        self.on_bad_record = on_bad_record
        self.train_path = train_path
        self.val_path = val_path
        self.seed = seed
        self.locality_path = locality_path
        self.locality_probes = locality_probes
        self.num_workers = num_workers
        #: Folder of the file that is read; paths in records are relative to it.
        self.folder: Path | None = None
        self._loaded: dict[Split, LoadedSplit] = {}
        self._lost_subjects: list[str] = []

    @abstractmethod
    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record, whose name ``id`` the example and its requests get.

        Raises:
            InvalidRequestError: A field does not fit.
            SkipRecord: The record states no edit, and the dataset's format allows that.
        """

    def unpack(self, records: list[Record]) -> list[Record]:
        """The records of the facts, where a file holds them inside of others."""
        return records

    def subject_of(self, prompt: str, subject: str | None, id: str) -> str | None:
        """The subject of a request if its prompt has it; else ``None``, counted in a warning.

        Published files name subjects that the question has in other words. Such a record is usable
        by all methods that need no subject.
        """
        if subject is not None and subject not in prompt and not spans_of(subject, prompt):
            self._lost_subjects.append(id)
            return None
        return subject

    @property
    def start(self) -> int:
        """The seed, or else that of the run."""
        return run_seed() if self.seed is None else self.seed

    # Examples ----------------------------------------------------------------------------------

    def examples(self, split: Split = "test") -> list[EditExample]:
        """The examples of a split; its file is read at the first call.

        Raises:
            DataFileError: The file is absent, or holds records that do not fit.
        """
        examples = list(self._load(split).examples)
        if self.order and split == "test":
            random.Random(f"order {self.order} of seed {run_seed()}").shuffle(examples)
        return examples

    @property
    def source(self) -> dict[str, dict[str, Any]]:
        """For each split read so far: path, SHA-256, records used and records skipped."""
        return {split: loaded.source() for split, loaded in self._loaded.items()}

    def setup(self, stage: str | None = None) -> None:
        """Read the files that a stage needs; those already read are not read again."""
        if stage == "fit":
            self._load("train")
            if self.split_path("validation") is not None:
                self._load("validation")
        elif stage == "validate":
            self._load("validation")
        else:
            self._load("test")

    def split_path(self, split: Split) -> Path | None:
        """The file of a split, or ``None`` when no file was named for it."""
        named = getattr(self, _OPTION[split])
        return None if named is None else Path(named).expanduser()

    # Loaders; the method says how many examples travel together ---------------------------------

    def train_dataloader(self) -> BatchLoader[EditBatch]:
        """Shuffled batches of ``fit_batch_size``, a setting of the method."""
        loaded = self._load("train")
        method = None if self.trainer is None else self.trainer.lightning_module
        size = int(getattr(method, "fit_batch_size", None) or 1)
        choose = getattr(method, "examples_to_fit", list)
        examples: list[EditExample] = choose(loaded.examples)
        rank, world_size = process_rank()
        seed = self.start

        def batches(epoch: int) -> list[EditBatch]:
            rows = training_chunks(examples, size, seed, epoch, rank, world_size)
            return [EditBatch(list(chunk)) for chunk in rows]

        identity: dict[str, int | str] = {
            "data": loaded.sha256,
            "records": len(examples),
            "batch size": size,
            "seed": seed,
            "processes": world_size,
        }
        steps = -(-(len(examples) // world_size) // size)
        return BatchLoader(batches, steps, identity, prepared=self._with_pictures)

    def val_dataloader(self) -> BatchLoader[EditBatch] | NoLoaders:
        """Chunks of the protocol, in the order of the file; nothing without a validation file."""
        if "validation" not in self._loaded and self.split_path("validation") is None:
            return NoLoaders()
        return self._chunk_loader("validation")

    def test_dataloader(self) -> BatchLoader[EditBatch]:
        """Chunks of the protocol, in the order that it asks for."""
        return self._chunk_loader("test")

    predict_dataloader = test_dataloader

    def _chunk_loader(self, split: Split) -> BatchLoader[EditBatch]:
        loaded = self._load(split)
        rank, world_size = process_rank() if self.deals_out_chunks else (0, 1)
        rows = evaluation_chunks(self.examples(split), self.chunk_size, rank, world_size)
        batches = [EditBatch(list(chunk)) for chunk in rows]
        identity: dict[str, int | str] = {"data": loaded.sha256, "records": len(loaded.examples)}
        identity["chunk size"] = self.chunk_size
        return BatchLoader(lambda epoch: batches, len(batches), identity, 0, self._with_pictures)

    def _with_pictures(self, batches: Iterator[EditBatch]) -> Iterator[EditBatch]:
        method = None if self.trainer is None else self.trainer.lightning_module
        base = getattr(method, "base", None)
        return with_pictures(list(batches), self.num_workers, base and base.encoder.images)

    # Reading -----------------------------------------------------------------------------------

    def select(self, examples: list[EditExample]) -> list[EditExample]:
        """The examples that ``limit`` keeps: the first ones."""
        return examples[: self.limit]

    def _load(self, split: Split) -> LoadedSplit:
        if split not in _OPTION:
            raise UnsupportedUseError(
                f"there is no split {split!r}; it is one of {', '.join(_OPTION)}"
            )
        if self.limit is not None and self.limit < 1:
            raise UnsupportedUseError(
                f"limit must be at least 1, got {self.limit}; leave it out to use all records"
            )
        if split not in self._loaded:
            loaded = self._read(split)
            if self.locality_path is not None and split != "train":
                probes = locality_set(Path(self.locality_path).expanduser())
                examples = with_locality(loaded.examples, probes, self.locality_probes)
                loaded = replace(loaded, examples=examples)
            self._loaded[split] = loaded
            if texts := trimmed_texts(loaded.items()):
                name = "the fact given" if loaded.path is None else Path(loaded.path).name
                rank_zero_warn(f"{name}: {texts}")
        return self._loaded[split]

    def _read(self, split: Split) -> LoadedSplit:
        path, option = self.split_path(split), _OPTION[split]
        way_out = f"{option} (--data.{option} FILE on the command line){self.where_to_get_it}"
        if path is None:
            use = {"train": "fit", "validation": "validate", "test": "edit, test or predict"}[split]
            raise DataFileNotFoundError(
                f"{type(self).__name__} was given no file for {use}: set {way_out}"
            )
        try:
            records, sha256, found = self._parsed(path)
        except DataFileNotFoundError as error:
            raise DataFileNotFoundError(f"{error}; correct {way_out}") from error
        examples, bad, skipped, places = found
        if self._lost_subjects:
            rank_zero_warn(lost_subjects(path.name, self._lost_subjects))
        known = advice([record.values for record in records], type(self).__name__)
        hint, most = (f" ({known})", SHOWN_OF_FOREIGN) if known else ("", SHOWN)
        left_out = self._left_out(
            path.name, len(records), len(examples), bad, skipped, hint=hint, most=most
        )
        if self.known_fields and (names := unread_fields(records, self.known_fields)):
            reader = type(self).__name__
            rank_zero_warn(f"{path.name} has fields that {reader} does not read{hint}: {names}")
        kept = self.select(examples)
        conflicts, sentence = contradictory(kept)
        if sentence:
            rank_zero_warn(f"{path.name}: {sentence}")
        return LoadedSplit(kept, str(path), sha256, left_out, conflicts, places)

    def _parsed(self, path: Path) -> tuple[list[Record], str, Parsed]:
        """Records, hash and examples of a file, read no further than ``limit`` asks."""
        # One that draws from the whole file has to read it.
        self.folder = path if path.is_dir() else path.parent
        most = self.limit if type(self).select is EditDataModule.select else None
        while True:
            read, sha256 = read_source(path, most)
            records = self.unpack(read)
            self._lost_subjects = []
            found = parsed(self, records)
            short = (
                most is not None and len(found.examples) < (self.limit or 0) and len(read) == most
            )
            if not short or (found.bad and self.on_bad_record == "error"):
                return records, sha256, found
            most = 2 * len(read)  # some were left out

    def leave_out(self, split: Split, reasons: Mapping[str, str]) -> None:
        """Treat examples as bad records, which ``on_bad_record`` is about.

        Args:
            split: The split they are of.
            reasons: A clause for each of them, by its id.

        Raises:
            DataFileError: There are any and ``on_bad_record`` is ``error``, or none is left.
        """
        loaded = self._load(split)
        if not reasons:
            return
        bad = [Complaint(loaded.places.get(id, id), reason) for id, reason in reasons.items()]
        kept = [example for example in loaded.examples if example.id not in reasons]
        name = Path(loaded.path or type(self).__name__).name
        left_out = self._left_out(name, len(loaded.examples), len(kept), bad)
        skipped = [*loaded.skipped, *left_out]
        self._loaded[split] = replace(loaded, examples=kept, skipped=skipped)

    def _left_out(
        self,
        name: str,
        count: int,
        usable: int,
        bad: list[Complaint],
        skipped: Sequence[Complaint] = (),
        hint: str = "",
        most: int = SHOWN,
    ) -> list[str]:
        """Clauses of the records left out of ``count``, of which a warning tells."""
        if bad and self.on_bad_record == "error":
            raise DataFileError(
                f"{name} has {len(bad)} bad record{'s' * (len(bad) > 1)} of {count}{hint}: "
                f"{listed(bad, name, most)}; correct them, or leave them out with on_bad_record: "
                "skip (--data.on_bad_record skip)"
            )
        left_out = [*bad, *skipped]
        clauses = listed(left_out, name, most)
        if not usable:
            raise DataFileError(f"{name} holds no usable record{hint}: {clauses}")
        if left_out:
            rank_zero_warn(
                f"{len(left_out)} of {count} records of {name} are left out{hint}: {clauses}"
            )
        return [*map(str, left_out)]
