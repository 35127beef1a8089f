"""The folder a run writes to, and from which it can be continued."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark import RunContext
from kedit_lightning.contradictions import consistent
from kedit_lightning.edits import Edit
from kedit_lightning.edits.edit_file import read_edit, write_atomically
from kedit_lightning.edits.state_schema import check_value
from kedit_lightning.errors import EditFileError, EditOrderError, ResumeError, article_list
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.requests import EditRequest

_CSV_READINGS = ("tf_tok", "tf_all", "log_prob", "contrast_log_prob", "text", "kl")
_CSV_COLUMNS = ("id", "stage", "subject", "kind", "group", "prompt", "answers", "contrast")


class StackEntry(TypedDict):
    """An edit in ``stack.json``."""

    file: str
    id: str
    sha256: str
    requests: list[str]


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
        started = (self.path / "run.json").is_file()
        if resume:
            if not started:
                raise ResumeError(
                    f"{self.path} holds no run to continue (no run.json in it); start one with "
                    f"--output {self.path}"
                )
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

    # ---- settings

    def start(self, settings: Mapping[str, Any]) -> None:
        """Keep the settings of a new run; compare them with those of the run to be continued.

        Raises:
            ResumeError: The run to be continued had other settings; the message names them.
        """
        now = json.loads(json.dumps(dict(settings), default=str))
        if not self.resumed:
            self.write_json("run.json", now)
            return
        then = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        protocol = then.get("protocol", {})
        if "max_new_tokens" in protocol:
            protocol.setdefault("answers", "squad")  # the rule of runs that name none
        changed = list(_differences(then, now))
        if changed:
            raise ResumeError(
                f"{self.path} was started with other settings: {article_list(changed)}; restore "
                "them, or start a new run in another folder with --output"
            )

    # ---- records

    def _read_records(self, first: bool) -> None:
        """Read complete lines, and cut off what a crash has left behind the last one."""
        if not self.results.is_file():
            return
        content = self.results.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], start=1):
            try:
                record = json.loads(line)
                self._records[record["id"], record["stage"]] = record
                if "edit_name" in record:
                    self._scored[record["edit_name"]] = record["edit_id"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ResumeError(
                    f"line {number} of {self.results} is no record, so the run cannot be "
                    "continued; remove that line, or start a new run in another folder"
                ) from error
        if first and len(whole) != len(content):
            with self.results.open("r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())

    def record(self, id: str, stage: str) -> ExampleRecord | None:
        """The record of an example at a stage, if an interrupted run has written it."""
        return self._records.get((id, stage))

    def records(self) -> Iterator[ExampleRecord]:
        """All records, in the order they were written."""
        if self.results.is_file():
            with self.results.open(encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)

    def append(self, record: ExampleRecord) -> None:
        """Write a record; it is on disk when this returns."""
        self.path.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, ensure_ascii=False) + "\n"
        # One write, so that several processes may append to one file.
        with self.results.open("ab", buffering=0) as file:
            file.write(line.encode("utf-8"))
            os.fsync(file.fileno())

    # ---- edits

    def edit_path(self, name: str) -> Path:
        """The file of an edit."""
        return self.path / "edits" / f"{name}.safetensors"

    def save_edit(self, name: str, edit: Edit) -> None:
        """Write an edit; the file is whole or not there."""
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
        header, _ = read_edit(path)
        if scored not in (None, header["id"]):
            raise EditFileError(
                f"{path} is edit {header['id']}, and {self.results} has the scores of edit "
                f"{scored} for it; put that edit back, or start a new run in another folder"
            )
        return {
            "file": f"edits/{path.name}",
            "id": header["id"],
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "requests": _labels(header["origin"]),
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
        text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
        write_atomically(self.path / name, text.encode("utf-8"))

    def write_csv(self) -> None:
        """Write ``results.csv``: a line per probe, with readings before and after."""
        states = ("base", "before", "after")
        readings = [f"{state}_{name}" for state in states for name in _CSV_READINGS]
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([*_CSV_COLUMNS, *readings])
        for record in self.records():
            for probe in record["probes"]:
                values: dict[str, Any] = {**record, **probe}
                values["answers"] = " | ".join(probe["answers"])
                row = [values.get(name) for name in _CSV_COLUMNS]
                row += [values[state].get(name) for state in states for name in _CSV_READINGS]
                writer.writerow(row)
        write_atomically(self.path / "results.csv", text.getvalue().encode("utf-8"))


def open_output(
    output: str | Path | None, resume: str | Path | None, first: bool = True
) -> OutputFolder | None:
    """The folder of a new or resumed run, if one was named.

    Raises:
        ResumeError: Both were named and differ, or the folder does not fit.
    """
    if resume is None:
        return None if output is None else OutputFolder(output, first=first)
    if output is not None and Path(output).resolve() != Path(resume).resolve():
        raise ResumeError(
            f"--resume {resume} continues a run where it is, and --output {output} names another "
            "folder; leave out --output"
        )
    return OutputFolder(resume, resume=True, first=first)


def output_of(run: RunContext) -> OutputFolder | None:
    """The output folder of a run, if it has one."""
    return run.output if isinstance(run.output, OutputFolder) else None


def load_stack(path: str | Path, base: BaseModel) -> list[Edit]:
    """The saved edits of an output folder in their order, or the edit of a single file.

    Raises:
        EditFileError: There are no edits, or a file is absent or damaged.
        BaseModelMismatchError: They were made for another base model.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return [Edit.load(path, base)]
    if not path.exists():
        raise EditFileError(f"there is nothing at {path}; correct the path of the edits (--edits)")
    order = path / "stack.json"
    if not order.is_file():
        hint = (
            f"; its run did not end, finish it with --resume {path}"
            if (path / "run.json").is_file()
            else "; give the --output folder of `kedit edit` or `kedit test`, or one saved edit"
        )
        raise EditFileError(f"{path} holds no saved edits (no stack.json in it){hint}")
    edits = []
    for entry in _stack_entries(order):
        file = path / entry["file"]
        if not file.is_file():
            raise EditFileError(f"{order} names {entry['file']}, which is absent")
        if hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
            raise EditFileError(
                f"{file} is not the edit that {order.name} names: its content has changed"
            )
        edit = Edit.load(file, base)
        if (edit.id, _labels(edit.origin.to_json())) != (entry["id"], entry["requests"]):
            raise EditFileError(f"{file} is not the edit that {order.name} names: id or requests")
        edits.append(edit)
    return edits


def _labels(origin: Mapping[str, Any]) -> list[str]:
    """How ``stack.json`` names the requests of an edit."""
    return [request.get("id") or request["prompt"] for request in origin["requests"]]


def _stack_entries(order: Path) -> list[StackEntry]:
    try:
        entries: list[StackEntry] = json.loads(order.read_text(encoding="utf-8"))["edits"]
        check_value("its list of edits", entries, list[StackEntry])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise EditFileError(
            f"{order} is damaged ({str(error) or repr(error)}); finish or repeat its run, or name "
            "one of the saved edits beside it"
        ) from error
    return entries


def apply_saved(edits: Iterable[Edit]) -> None:
    """Apply edits in order, with one warning if they were computed independently of each other.

    Raises:
        EditOrderError: An edit only makes sense on the stack it was computed on.
    """
    apart = 0
    for edit in edits:
        apart += bool(edit.origin.method) and edit.origin.stack != edit.base.edits.ids
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"edit \S+ by .* was computed on top of")
            try:
                edit.apply()
            except EditOrderError as error:
                raise EditOrderError(
                    f"{error}; `kedit edit --trainer.protocol.mode sequential` computes edits that "
                    "stand on each other"
                ) from error
    if apart:
        warnings.warn(
            "the saved edits were computed apart from each other, as single mode does; applied "
            "together they may act otherwise than they were scored",
            stacklevel=2,
        )


def _differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """Clauses that name what differs between two nested settings."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from _differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        yield f"{name}: {then!r} -> {now!r}"
