"""Lines of ``ledger.jsonl``: each names the one before it by its hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.state_schema import check_value
from kedit_lightning.errors import EditFileError, KEditError, LedgerError, OutputFolderError
from kedit_lightning.requests import EditRequest

#: What a revert does about later edits: solves them again with their keys and wanted outputs,
#: computes them again from their facts, or keeps them as they are.
Later: TypeAlias = Literal["solve", "replay", "keep"]
#: Fields of a line that its hash does not cover.
_UNHASHED = ("id", "timing")
#: The parent of the first line.
ROOT = ""


@dataclass(frozen=True)
class SavedEdit:
    """An edit file of a ledger.

    Args:
        id: Hash of the edit's content, and name of its file.
        sha256: Hash of the file.
        equations: Hash of the file of what it was solved from; empty if it was not.
    """

    id: str
    sha256: str
    equations: str = ""


@dataclass(frozen=True)
class LedgerBase:
    """The base model of a ledger: what it is loaded by, and what it is known by."""

    name: str
    dtype: str
    revision: str | None
    fingerprint: str
    full_fingerprint: str
    tokenizer_fingerprint: str


@dataclass(frozen=True)
class Randomness:
    """What the global random numbers of an edit follow from."""

    seed: int
    name: str


@dataclass(frozen=True)
class StreamPlace:
    """The run of ``kedit edit`` that a line was written in.

    Args:
        key: Hash of what the run was asked for.
        start: Number of lines before it began.
    """

    key: str
    start: int


@dataclass(frozen=True)
class EditLine:
    """A line that adds an edit.

    Args:
        number: Place of the line in the ledger, from 1.
        parent: Id of the line before.
        method: Class name of the editing method.
        given: Parameters its constructor got; ``None`` where they are no plain values.
        learned: Hash of what the method had learned before; empty if nothing.
        requests: The facts.
        base_model: The base model.
        edit: The file.
        random: What global random numbers follow from.
        run: The run that it was written in, if any.
        timing: When it was written.
        id: Hash of all but the timing.
    """

    kind: ClassVar[str] = "edit"
    number: int
    parent: str
    method: str
    given: Mapping[str, Any] | None
    learned: str
    requests: tuple[EditRequest, ...]
    base_model: LedgerBase
    edit: SavedEdit
    random: Randomness
    run: StreamPlace | None = None
    timing: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        requests = EditOrigin(requests=self.requests).to_json()["requests"]
        return {"kind": self.kind, **asdict(self), "requests": requests}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EditLine:
        """Rebuild from :meth:`to_json`."""
        check_value("it", values, cls)
        run = values.get("run")
        parts = {
            "requests": tuple(EditRequest.recorded(**r) for r in values["requests"]),
            "base_model": LedgerBase(**values["base_model"]),
            "edit": SavedEdit(**values["edit"]),
            "random": Randomness(**values["random"]),
            "run": None if run is None else StreamPlace(**run),
        }
        return cls(**{**values, **parts})


@dataclass(frozen=True)
class RevertLine:
    """A line that takes an edit out.

    Args:
        number: Place of the line in the ledger, from 1.
        parent: Id of the line before.
        entry: Number of the line that added the edit.
        later: What was done about later edits.
        edits: Files of the later edits that were solved or computed again, by the number of their
            line.
        timing: When it was written.
        id: Hash of all but the timing.
    """

    kind: ClassVar[str] = "revert"
    number: int
    parent: str
    entry: int
    later: Later
    edits: Mapping[str, SavedEdit]
    timing: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RevertLine:
        """Rebuild from :meth:`to_json`."""
        check_value("it", values, cls)
        for name, edit in values["edits"].items():
            int(name)
            check_value("an edit of it", edit, SavedEdit)
        edits = {name: SavedEdit(**edit) for name, edit in values["edits"].items()}
        return cls(**{**values, "edits": edits})


Line: TypeAlias = EditLine | RevertLine
L = TypeVar("L", EditLine, RevertLine)
_KINDS: dict[str, type[EditLine] | type[RevertLine]] = {c.kind: c for c in (EditLine, RevertLine)}


def line_id(values: Mapping[str, Any]) -> str:
    """Hash of a line's content and of its parent's id, hence of all lines up to it."""
    hashed = {name: value for name, value in values.items() if name not in _UNHASHED}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class ReadLines:
    """The whole lines of a ledger, as far as they were read.

    Args:
        lines: The lines.
        end: Bytes that they take.
        last: The last of them as the file has it, with its end.
    """

    lines: list[Line] = field(default_factory=list)
    end: int = 0
    last: bytes = b""

    def follow(self, path: Path) -> list[Line]:
        """Read what was added since; all again where the last line is another.

        What a crash has left behind the last line is no line.

        Raises:
            LedgerError: A line is damaged, or does not follow the one before it.
        """
        try:
            with path.open("rb") as file:
                file.seek(self.end - len(self.last))
                content = file.read()
                if not content.startswith(self.last):
                    file.seek(0)
                    content, self.last = file.read(), b""
        except FileNotFoundError:
            content, self.last = b"", b""
        except OSError as error:
            raise LedgerError(
                f"{path.parent} cannot be read as a ledger ({error.strerror}); a ledger is a "
                "folder: correct its path, or its rights"
            ) from error
        if not self.last:
            self.lines, self.end = [], 0
        new = content[len(self.last) : content.rfind(b"\n") + 1]
        if new:
            self.lines += parsed(path, new, self.lines)
            self.end += len(new)
            self.last = new[new.rfind(b"\n", 0, -1) + 1 :]
        return self.lines

    def append(self, path: Path, line: L) -> L:
        """Write a line behind the last one; it is on disk when this returns.

        Returns:
            The line with its id.

        Raises:
            OutputFolderError: It cannot be written.
        """
        values = line.to_json()
        values["id"] = line_id(json.loads(json.dumps(values)))
        text = (json.dumps(values, ensure_ascii=False) + "\n").encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if path.is_file() else "wb", buffering=0) as file:
                file.truncate(self.end)
                file.seek(self.end)
                rest = text
                while rest:  # a disk that is nearly full takes a part
                    rest = rest[file.write(rest) or 0 :]
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputFolderError.of(path, error) from error
        whole = replace(line, id=values["id"])
        self.lines.append(whole)
        self.end, self.last = self.end + len(text), text
        return whole


def parsed(path: Path, content: bytes, before: Sequence[Line]) -> list[Line]:
    """The lines in some bytes of a ledger, which follow others.

    Raises:
        LedgerError: A line is damaged, or does not follow the one before it.
    """
    lines, known = list(before), len(before)
    for number, text in enumerate(content.split(b"\n")[:-1], start=known + 1):
        parent = lines[-1].id if lines else ROOT
        try:
            values = json.loads(text.decode("utf-8"))
            whole = line_id(values) == values["id"] and values["parent"] == parent
            line = _KINDS[values.pop("kind")].from_json(values) if whole else None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, KEditError):
            line = None
        if line is None or line.number != number or not _refers(line, lines):
            raise LedgerError(
                f"line {number} of {path} is damaged or was changed: its content is not what its "
                "hash says, or it does not follow the line before it; put back a copy of the file"
            )
        lines.append(line)
    return lines[known:]


def _refers(line: Line, before: Sequence[Line]) -> bool:
    """Whether a line names earlier lines that add an edit, if any."""
    named = [line.entry, *map(int, line.edits)] if isinstance(line, RevertLine) else []
    return all(0 < n <= len(before) and isinstance(before[n - 1], EditLine) for n in named)


def standing(lines: Sequence[Line]) -> dict[int, SavedEdit]:
    """The edits that stand after some lines, by the number of the line that added each."""
    found: dict[int, SavedEdit] = {}
    for line in lines:
        advance(found, line)
    return found


def advance(found: dict[int, SavedEdit], line: Line) -> None:
    """Change the edits that stand as a line says."""
    if isinstance(line, EditLine):
        found[line.number] = line.edit
    else:
        del found[line.entry]
        found |= {int(number): edit for number, edit in line.edits.items()}


def checked_file(path: Path, sha256: str, named: Callable[[], str]) -> Path:
    """The path of a file, once its content is what the ledger says.

    Args:
        path: The file.
        sha256: Hash of its content.
        named: Gives words for what it holds.

    Raises:
        EditFileError: It is absent, or has changed.
    """
    if not path.is_file():
        raise EditFileError(f"{path}, with {named()}, is absent; put back a copy of it")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise EditFileError(
            f"{path} is not what the ledger names, {named()}: its content has changed; put back a "
            "copy of it"
        )
    return path
