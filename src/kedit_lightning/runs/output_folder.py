"""The folder a run writes to, and from which it can be continued."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark import RunContext
from kedit_lightning.contradictions import consistent
from kedit_lightning.edits import Edit
from kedit_lightning.edits.edit_file import read_edit, write_atomically
from kedit_lightning.errors import (
    EditFileError,
    KEditError,
    OutputFolderError,
    ResumeError,
    article_list,
)
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.requests import EditExample, EditRequest
from kedit_lightning.runs.folder_claim import claimed
from kedit_lightning.runs.record_lines import line_of, read_lines
from kedit_lightning.runs.resumption import read_settings, scored_changes, setting_changes
from kedit_lightning.runs.saved_stack import StackEntry, labels

_CSV_READINGS = ("tf_tok", "tf_all", "log_prob", "contrast_log_prob", "text", "kl")
_CSV_COLUMNS = ("id", "stage", "subject", "kind", "group", "prompt", "answers", "contrast")
#: What a disk answers that is full, broken, or not to be written to.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)


class OutputFolder:
    """Files of a run of ``edit`` or ``test``.

    A record is a line of ``results.jsonl``, on disk before the next example starts; an edit is
    either whole or not there. ``run.json`` holds the settings that a continued run must share.

    Args:
        path: The folder.
        resume: Continue what is there; otherwise results must not be there yet.
        first: Whether this is the first process of the run; others find what it has written.

    Raises:
        ResumeError: There is nothing to continue, or something that must not be overwritten.
    """

    def __init__(self, path: str | Path, resume: bool = False, first: bool = True) -> None:
        self.path = Path(path)
        self.resumed = resume
        self._edits: dict[str, StackEntry] = {}
        self._records: dict[tuple[str, str], ExampleRecord] = {}
        #: Ids of the edits that records of an interrupted run are scores of, by name.
        self._scored: dict[str, str] = {}
        #: The settings of the run that is continued.
        self._asked: dict[str, Any] = {}
        started = (self.path / "run.json").is_file()
        if resume:
            if not started:
                raise ResumeError(
                    f"{self.path} holds no run to continue (no run.json in it); start one with "
                    f"--output {self.path}"
                )
            self._asked = read_settings(self.path / "run.json")
            self._read_records(first)
        elif first and (started or self.results.exists()):
            raise ResumeError(
                f"{self.path} holds the results of an earlier run; continue that run with "
                f"--resume {self.path}, or name another folder for this one"
            )

    @property
    def results(self) -> Path:
        """The file with one record per line."""
        return self.path / "results.jsonl"

    @property
    def state(self) -> str:
        """What of a run that ended early is kept here, and how it goes on."""
        if not (self.path / "run.json").is_file():
            return f"nothing had been written to {self.path}; start the run again as before"
        lines = self.results.read_bytes().count(b"\n") if self.results.exists() else 0
        return f"finished examples are kept, {lines} of them, continue with --resume {self.path}"

    def add_way_out(self, error: BaseException) -> None:
        """Tell how a run can be continued that an error has ended, if it can."""
        if self.results.exists():
            error.add_note(self.state)

    # ---- settings

    def start(
        self,
        settings: Mapping[str, Any],
        examples: Sequence[EditExample] = (),
        left_out: Collection[tuple[str, int]] = frozenset(),
    ) -> None:
        """Keep the settings of a new run; compare them with those of the run to be continued.

        Args:
            settings: The settings.
            examples: Those of the data, which may have become more or fewer.
            left_out: Requests that the run does not write, see :class:`RunContext`.

        Raises:
            ResumeError: The run to be continued had other settings, or has scored records that are
                others now; the message names them.
        """
        now = json.loads(json.dumps(dict(settings), default=str))
        if self.resumed:
            then = self._asked
            protocol = then["protocol"]
            if "max_new_tokens" in protocol:
                protocol.setdefault("answers", "squad")  # the rule of runs that name none
            changed = setting_changes(then, now, data_may_differ=bool(examples))
            if changed:
                raise ResumeError(
                    f"{self.path} was started with other settings: {article_list(changed)}; "
                    "restore them, or start a new run in another folder with --output"
                )
            if then == now:
                return
            records, edits = self._records.values(), self.path / "edits"
            if changed := list(scored_changes(records, examples, now["protocol"], edits, left_out)):
                raise ResumeError(
                    f"{self.path} has scores of other records than the data has now: "
                    f"{article_list(changed)}; restore them, or start a new run in another folder "
                    "with --output"
                )
        self.write_json("run.json", now)

    # ---- records

    def _read_records(self, first: bool) -> None:
        """Read complete lines, and cut off what a crash has left behind the last one."""
        if not self.results.is_file():
            return
        content = self.results.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for record in read_lines(self.results, whole):
            values: Mapping[str, Any] = record
            self._records[record["id"], record["stage"]] = record
            if "edit_name" in values:
                self._scored[values["edit_name"]] = values["edit_id"]
        if first and len(whole) != len(content):
            with _writing(self.results), self.results.open("r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())

    def record(self, id: str, stage: str) -> ExampleRecord | None:
        """The record of an example at a stage, if an interrupted run has written it."""
        return self._records.get((id, stage))

    def records(self) -> Iterator[ExampleRecord]:
        """All records, in the order they were written."""
        content = self.results.read_bytes() if self.results.is_file() else b""
        return read_lines(self.results, content)

    def append(self, record: ExampleRecord) -> None:
        """Write a record; it is on disk when this returns.

        Raises:
            OutputFolderError: It cannot be written.
        """
        line = line_of(record)
        with _writing(self.results):
            self.path.mkdir(parents=True, exist_ok=True)
            # One write, so that several processes may append to one file.
            with self.results.open("ab", buffering=0) as file:
                while line:  # a disk that is nearly full takes a part
                    line = line[file.write(line) or 0 :]
                os.fsync(file.fileno())

    # ---- edits

    def edit_path(self, name: str) -> Path:
        """The file of an edit."""
        return self.path / "edits" / f"{name}.safetensors"

    def save_edit(self, name: str, edit: Edit) -> None:
        """Write an edit; the file is whole or not there."""
        with _writing(self.edit_path(name)):
            edit.save(self.edit_path(name))
        self._edits[name] = self._described(name)

    def has_edit(self, name: str) -> bool:
        """Whether an interrupted run has saved an edit."""
        return self.resumed and self.edit_path(name).is_file()

    def edit(self, name: str, base: BaseModel, requests: Sequence[EditRequest]) -> Edit | None:
        """An edit that an interrupted run has saved.

        Raises:
            EditFileError: It is damaged, or writes other requests.
        """
        if not self.has_edit(name):
            return None
        path = self.edit_path(name)
        try:
            edit = Edit.load(path, base)
            if edit.origin.requests != tuple(consistent(requests)):
                raise EditFileError(f"{path} does not write the requests of '{name}' in this run")
        except EditFileError as error:
            way_out = "delete that file to have the edit computed again"
            raise EditFileError(f"{error}; {way_out}") from error
        self._edits[name] = self._described(name, self._scored.get(name))
        return edit

    def _described(self, name: str, scored: str | None = None) -> StackEntry:
        path = self.edit_path(name)
        try:
            header, _ = read_edit(path)
        except EditFileError as error:
            way_out = (
                "put back a copy of it, or delete it and"
                if path.exists()
                else "put it back, or delete"
            )
            raise EditFileError(
                f"{error}; {way_out} the lines with its name in {self.results} to have edit and "
                "scores computed again"
            ) from error
        if scored not in (None, header["id"]):
            raise EditFileError(
                f"{path} is edit {header['id']}, and {self.results} has the scores of edit "
                f"{scored} for it; put that edit back, or start a new run in another folder"
            )
        return {
            "file": f"edits/{path.name}",
            "id": header["id"],
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "requests": labels(header["origin"]),
        }

    def write_stack(self, facts: Mapping[str, Any]) -> None:
        """Write ``stack.json``: facts such as the base model, and the edits in their order."""
        records: Iterator[Mapping[str, Any]] = self.records()
        names = [str(record["edit_name"]) for record in records if "edit_name" in record]
        order = [
            self._edits.get(name) or self._described(name, self._scored.get(name))
            for name in [*names, *self._edits]
        ]
        unique = {entry["file"]: entry for entry in order}
        self.write_json("stack.json", {**facts, "edits": list(unique.values())})

    # ---- summaries

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file; it is whole or not there."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file; it is whole or not there."""
        with _writing(self.path / name):
            write_atomically(self.path / name, text.encode("utf-8"))

    def write_csv(self, records: Iterable[ExampleRecord]) -> None:
        """Write ``results.csv``: a line per probe, with readings before and after."""
        states = ("base", "before", "after")
        readings = [f"{state}_{name}" for state in states for name in _CSV_READINGS]
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([*_CSV_COLUMNS, *readings])
        for record in records:
            for probe in record["probes"]:
                values: dict[str, Any] = {**record, **probe}
                values["answers"] = " | ".join(probe["answers"])
                row = [values.get(name) for name in _CSV_COLUMNS]
                row += [values[state].get(name) for state in states for name in _CSV_READINGS]
                writer.writerow(row)
        self.write_text("results.csv", text.getvalue())


@contextmanager
def opened(
    output: str | Path | None, resume: str | Path | None, first: bool = True
) -> Iterator[OutputFolder | None]:
    """The folder of a new or resumed run, if one was named; inside, no other run may use it.

    Raises:
        ResumeError: Both were named and differ, or the folder does not fit.
        OutputFolderError: It is in use, or cannot be written to.
    """
    if (
        output is not None
        and resume is not None
        and Path(output).resolve() != Path(resume).resolve()
    ):
        raise ResumeError(
            f"--resume {resume} continues a run where it is, and --output {output} names another "
            "folder; leave out --output"
        )
    named = output if resume is None else resume
    if named is None:
        yield None
        return
    with claimed(Path(named), create=resume is None) if first else nullcontext():
        folder = OutputFolder(named, resume is not None, first)
        try:
            yield folder
        except OSError as error:
            if isinstance(error, KEditError) or error.errno not in _DISK:
                folder.add_way_out(error)
                raise
            failure = OutputFolderError.of(error.filename or folder.path, error)
            folder.add_way_out(failure)
            raise failure from error
        except KEditError as error:
            folder.add_way_out(error)
            raise


def output_of(run: RunContext) -> OutputFolder | None:
    """The output folder of a run, if it has one."""
    return run.output if isinstance(run.output, OutputFolder) else None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Inside, a file is written.

    Raises:
        OutputFolderError: It cannot be.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, KEditError):
            raise
        raise OutputFolderError.of(path, error) from error
