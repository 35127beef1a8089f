"""The edits of an output folder in their order, as ``stack.json`` has it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import Edit
from kedit_lightning.edits.stack_chain import stack_mark
from kedit_lightning.edits.state_schema import check_value
from kedit_lightning.errors import EditFileError, EditOrderError
from kedit_lightning.runs.ledger_record import FILE, LedgerRecord

_WAY_OUT = "put back a copy of it, or repeat the run in a new folder"


class StackEntry(TypedDict):
    """An edit in ``stack.json``."""

    file: str
    id: str
    sha256: str
    requests: list[str]


def load_stack(path: str | Path, base: BaseModel, force: bool = False) -> list[Edit]:
    """The saved edits of an output folder or a ledger in their order, or that of a single file.

    Args:
        path: The folder or file.
        base: The base model to edit.
        force: Load them even if they were made for another base model.

    Raises:
        EditFileError: There are no edits, or a file is absent or damaged.
        BaseModelMismatchError: They were made for another base model.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return [Edit.load(path, base, force)]
    if not path.exists():
        raise EditFileError(f"there is nothing at {path}; correct the path of the edits (--edits)")
    if (path / FILE).is_file():
        return LedgerRecord(path).edits(base, force)
    order = path / "stack.json"
    if not order.is_file():
        hint = (
            f"; its run did not end, finish it with --resume {path}"
            if (path / "run.json").is_file()
            else "; give the --output folder of `kedit edit` or `kedit test`, or one saved edit"
        )
        raise EditFileError(f"{path} holds no saved edits (no stack.json in it){hint}")
    return [_saved_edit(order, entry, base, force) for entry in _stack_entries(order)]


def first_edits(folder: Path, base: BaseModel, count: int) -> list[Edit]:
    """The first saved edits of an output folder, so many at most; none where it has none.

    Raises:
        EditFileError: ``stack.json`` or one of these edits is damaged.
        BaseModelMismatchError: They were made for another base model.
    """
    order = folder / "stack.json"
    entries = _stack_entries(order)[:count] if order.is_file() else []
    return [_saved_edit(order, entry, base) for entry in entries]


def edits_to_answer_under(method: Any, path: str | Path | None, force: bool) -> list[Edit]:
    """The saved edits at a path; without one, the edit of a method that writes no facts.

    Args:
        method: The editing method.
        path: The folder or file, if one was named.
        force: Load edits even if they were made for another base model.
    """
    if path is not None:
        return load_stack(path, method.base, force)
    return [] if method.writes_facts else [method.edit()]


def labels(origin: Mapping[str, Any]) -> list[str]:
    """How ``stack.json`` names the requests of an edit."""
    return [request.get("id") or request["prompt"] for request in origin["requests"]]


def _saved_edit(order: Path, entry: StackEntry, base: BaseModel, force: bool = False) -> Edit:
    """The edit of an entry of ``stack.json``.

    Raises:
        EditFileError: Its file is absent, or another one than the entry says.
    """
    file = order.parent / entry["file"]
    if not file.is_file():
        raise EditFileError(f"{order} names {entry['file']}, which is absent; {_WAY_OUT}")
    if hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
        raise EditFileError(
            f"{file} is not the edit that {order.name} names: its content has changed; {_WAY_OUT}"
        )
    edit = Edit.load(file, base, force)
    if (edit.id, labels(edit.origin.to_json())) != (entry["id"], entry["requests"]):
        raise EditFileError(
            f"{file} is not the edit that {order.name} names: id or requests; {_WAY_OUT}"
        )
    return edit


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
        apart += bool(edit.origin.method) and stack_mark(edit.origin.stack) != edit.base.edits.mark
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
