"""The folder of a ledger, as it is read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import Edit
from kedit_lightning.edits.origin import check_same_base
from kedit_lightning.edits.stack_chain import stack_mark
from kedit_lightning.errors import (
    EditFileError,
    EditOrderError,
    LedgerError,
    article_list,
)
from kedit_lightning.requests import EditRequest
from kedit_lightning.runs.folder_claim import claimed
from kedit_lightning.runs.ledger_lines import (
    EditLine,
    Line,
    ReadLines,
    RevertLine,
    SavedEdit,
    checked_file,
    standing,
)
from kedit_lightning.runs.ledger_state import LedgerState

#: Name of the file by which a folder is known as a ledger.
FILE = "ledger.jsonl"


class LedgerRecord:
    """The folder of a ledger, as it is read: lines, what stands after them, and edit files.

    Args:
        path: The folder, which need not be there.

    Raises:
        LedgerError: A line is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._read, self._state = ReadLines(), LedgerState()
        self.lines: list[Line] = self._read.follow(self.file)
        self._loaded: dict[str, Edit] = {}
        self._held = False

    @property
    def file(self) -> Path:
        """The file with the lines."""
        return self.path / FILE

    def edit_path(self, id: str) -> Path:
        """The file of an edit."""
        return self.path / "edits" / f"{id}.safetensors"

    def equations_path(self, id: str) -> Path:
        """The file of what an edit was solved from."""
        return self.path / "equations" / f"{id}.safetensors"

    # ---- what stands

    @property
    def standing(self) -> dict[int, SavedEdit]:
        """The edits that stand now, by the number of the line that added each, in order."""
        return dict(self.state.standing)

    @property
    def state(self) -> LedgerState:
        """What follows from the lines."""
        return self._state.follow(self.lines)

    @property
    def entries(self) -> list[EditLine]:
        """The lines whose edits stand now, in order."""
        return [self._added(number) for number in self.standing]

    @property
    def requests(self) -> list[EditRequest]:
        """The facts of the edits that stand now, in order."""
        return [request for line in self.entries for request in line.requests]

    def show(self, name: int | str) -> Line:
        """The line with a number, or whose id begins like this.

        Raises:
            LedgerError: There is none, or several.
        """
        text = str(name)
        if text.isdecimal() and 0 < int(text) <= len(self.lines):
            return self.lines[int(text) - 1]
        found = [line for line in self.lines if len(text) >= 4 and line.id.startswith(text)]
        if len(found) != 1:
            what = f"{len(found)} lines whose ids begin with" if found else "no line"
            raise LedgerError(
                f"{self.path} has {what} '{text}'; name a line by its number, 1 to "
                f"{len(self.lines)}, or by four or more letters of its id (`kedit log {self.path}`)"
            )
        return found[0]

    def after(self, name: int | str) -> dict[int, SavedEdit]:
        """The edits that stood after a line; after 0, none."""
        return standing(self.lines[: self.show(name).number]) if str(name) != "0" else {}

    def entry(self, name: int | str) -> EditLine:
        """The line that added an edit that stands now.

        Raises:
            LedgerError: The line takes one out, or its edit stands no more.
        """
        line = self.show(name)
        if isinstance(line, RevertLine):
            raise LedgerError(
                f"line {line.number} reverts line {line.entry}, and cannot be reverted itself; "
                "write its facts again with `kedit edit --ledger`"
            )
        if line.number not in self.state.standing:
            by = next(o.number for o in self.lines if _reverts(o, line.number))
            raise LedgerError(f"line {line.number} was reverted already, by line {by}")
        return line

    def edits(self, base: BaseModel, force: bool = False) -> list[Edit]:
        """The edits that stand now, oldest first, not applied by this.

        Args:
            base: The base model to edit.
            force: Load them even if they were made for another base model.

        Raises:
            EditFileError: A file is absent or damaged.
            BaseModelMismatchError: They were made for another base model.
        """
        return self.load_all(self.standing.values(), base, force)

    def load_all(
        self, edits: Iterable[SavedEdit], base: BaseModel, force: bool = False
    ) -> list[Edit]:
        """Edits of the ledger, not applied. The base model is compared once with what they say."""
        checked: set[tuple[str, ...]] = set()
        return [self.load(saved, base, force, checked) for saved in edits]

    @contextmanager
    def applied(
        self, base: BaseModel, state: Mapping[int, SavedEdit] | None = None
    ) -> Iterator[list[Edit]]:
        """Inside, the edits that stand now are applied, and nothing else.

        Args:
            base: The base model, without edits or with these.
            state: The edits of another state, such as that after an earlier line.

        Raises:
            EditOrderError: The base model carries other edits.
        """
        wanted = self.state.standing if state is None else state
        mark = self.state.mark if state is None else stack_mark([x.id for x in wanted.values()])
        if base.edits.mark == mark:
            with base.edits.restored():
                yield list(base.edits)
            return
        check_bare(base)
        edits = self.load_all(wanted.values(), base)
        with base.edits.restored():
            apply_edits(edits)
            yield edits

    def _added(self, number: int) -> EditLine:
        line = self.lines[number - 1]
        assert isinstance(line, EditLine)
        return line

    def load(
        self,
        saved: SavedEdit,
        base: BaseModel,
        force: bool = False,
        checked: set[tuple[str, ...]] | None = None,
    ) -> Edit:
        """An edit of the ledger, not applied.

        Args:
            saved: The edit.
            base: The base model to edit.
            force: Load it even if it was made for another base model.
            checked: Identities that were compared with the base model; this one is added.
        """
        held = self._loaded.get(saved.id)
        if held is None or held.base is not base:
            path = checked_file(self.edit_path(saved.id), saved.sha256, self._named(saved))
            # Its identity follows from all weights of the model, so it is asked for once.
            held = Edit.load(path, base, force or bool(checked))
            if held.id != saved.id:
                raise EditFileError(f"{path} is not the edit that the ledger names")
            if checked and not force and held.origin.identity not in checked:
                check_same_base(f"the edit in {path}", held.origin, base)
            if checked is not None:
                checked.add(held.origin.identity)
            self._loaded[saved.id] = held
        return held

    def _named(self, saved: SavedEdit) -> Callable[[], str]:
        """Gives words for the line of an edit and its facts, for messages."""

        def words() -> str:
            for number, known in self.state.standing.items():
                if known == saved:
                    facts = [
                        f"{r.prompt!r} -> {r.target_new!r}" for r in self._added(number).requests
                    ]
                    return f"edit {saved.id} of line {number}, {article_list(facts, 3)}"
            return f"edit {saved.id}"

        return words

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, no other process writes to the ledger, and its lines are those on disk.

        Raises:
            OutputFolderError: Another process writes to it now.
        """
        if self._held:
            yield
            return
        with claimed(self.path, True, "--ledger"):
            self.lines, self._held = self._read.follow(self.file), True
            try:
                yield
            finally:
                self._held = False


def apply_edits(edits: Sequence[Edit]) -> None:
    """Apply edits, those too that were kept when one below them was taken out."""
    with warnings.catch_warnings():  # a ledger says itself what was kept
        warnings.filterwarnings("ignore", message=r"edit \S+ by .* was computed on top of")
        for edit in edits:
            edit.apply()


def check_bare(base: BaseModel) -> None:
    """Refuse a base model that carries edits.

    Raises:
        EditOrderError: It does.
    """
    if base.edits.ids:
        raise EditOrderError(
            f"'{base.name}' carries edits other than those of the ledger "
            f"({article_list(list(base.edits.ids), 3)}); roll them back first"
        )


def _reverts(line: Line, number: int) -> bool:
    return isinstance(line, RevertLine) and line.entry == number
