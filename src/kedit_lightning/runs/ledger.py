"""A ledger: an append-only record of the edits on a base model, one folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark.costs import fixed_randomness
from kedit_lightning.contradictions import OnConflict
from kedit_lightning.edits import Edit
from kedit_lightning.edits.kept_equations import equations_kept
from kedit_lightning.edits.stack_chain import stack_mark
from kedit_lightning.errors import (
    EditOrderError,
    InvalidRequestError,
    LedgerError,
)
from kedit_lightning.requests import EditRequest
from kedit_lightning.runs.ledger_answers import (
    Blame,
    CheckedFact,
    LedgerDiff,
    blame_answer,
    check_facts,
    compare_states,
)
from kedit_lightning.runs.ledger_facts import new_facts
from kedit_lightning.runs.ledger_lines import (
    ROOT,
    EditLine,
    Later,
    Randomness,
    RevertLine,
    SavedEdit,
    StreamPlace,
)
from kedit_lightning.runs.ledger_record import LedgerRecord, apply_edits, check_bare
from kedit_lightning.runs.ledger_solution import (
    check_solvable,
    read_equations,
    save_equations,
    solved_without,
)
from kedit_lightning.runs.recomputation import (
    Recomputation,
    described_base,
    given_settings,
    learned_hash,
)

L = TypeVar("L", EditLine, RevertLine)


class Replayed(NamedTuple):
    """An edit that was computed again.

    Args:
        line: The line that added it.
        edit: The new edit, not applied.
        equal: Whether it is bit for bit the one of the ledger.
    """

    line: EditLine
    edit: Edit
    equal: bool


class Ledger(LedgerRecord):
    """The edits on a base model, each on top of those before it, and what became of them.

    A line of ``ledger.jsonl`` adds an edit or takes one out; none is ever changed. What stands now
    follows from the lines alone. A line is named by its number, or by the beginning of its id.

    Args:
        path: The folder, which the first edit creates.

    Raises:
        LedgerError: A line is damaged.
    """

    # ---- verbs that write

    def append(
        self, method: Any, requests: Sequence[EditRequest], on_conflict: OnConflict = "last"
    ) -> EditLine:
        """Compute an edit on top of those that stand, and write it down; it is not applied.

        Facts that stand already are left out, with a warning.

        Args:
            method: The editing method, with its base model.
            requests: The facts to write.
            on_conflict: What is done about facts that contradict each other, or standing ones: the
                ``last`` ones are written, with a warning, or all are refused.

        Raises:
            InvalidRequestError: All facts stand already, or some contradict others and shall not.
        """
        with self.writing():
            wanted = new_facts(self.state.facts, requests, self.path, on_conflict)
            if not wanted:
                raise InvalidRequestError(f"{self.path} holds all of these facts already")
            with self.applied(method.base):
                texts = [(r.prompt, r.target_new, r.subject) for r in wanted]
                name = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
                random = Randomness(method.settings.seed or 0, name)
                with fixed_randomness(random.seed, random.name), equations_kept():
                    edit = method.edit(wanted, on_conflict)
            return self.write(method, edit, random)

    def revert(
        self,
        name: int | str,
        base: BaseModel,
        later: Later | None = None,
        methods: Sequence[Any] = (),
    ) -> RevertLine:
        """Take an edit out, as if it had never been written.

        Args:
            name: Its line.
            base: The base model, without edits.
            later: What is done about later edits, which were computed on top of it. ``solve`` keeps
                their keys and the outputs that they want there, and solves for the weights again;
                ``replay`` computes all of it again from their facts; ``keep`` leaves them as they
                are. When absent, they are solved where all can be, or else computed again.
            methods: Methods that cannot be built from the ledger, such as those with a checkpoint.

        Raises:
            EditOrderError: A later edit reads the memories of those below it, and is to be kept.
            LedgerError: An edit cannot be computed again with what is there.
        """
        with self.writing():
            entry, now = self.entry(name), self.standing
            after = [self._added(number) for number in now if number > entry.number]
            redone: dict[str, SavedEdit] = {}
            found = Recomputation(base, methods)
            if later is None or later == "solve":
                later = self._how(entry.number, base, later)
            if later == "keep":
                for line in after:
                    if self.load(now[line.number], base).requires_its_stack:
                        raise EditOrderError(
                            f"the edit of line {line.number} by {line.method} reads what those "
                            "below it remember, so it cannot be kept; let it be computed again"
                        )
            elif later == "solve":
                for line, edit in solved_without(self, entry.number, base, found):
                    redone[str(line.number)] = self._save(edit)
            elif after:
                check_bare(base)
                below = self.load_all([now[n] for n in now if n < entry.number], base)
                with base.edits.restored(), equations_kept():
                    apply_edits(below)
                    for line in after:
                        edit = found.edit(line, self._settings(line, base))
                        apply_edits([edit])
                        redone[str(line.number)] = self._save(edit)
            new = RevertLine(*self._next(), entry.number, later, redone, _written_now())
            return self._append(new)

    def replay(
        self, base: BaseModel, drop: Collection[int | str] = (), methods: Sequence[Any] = ()
    ) -> list[Replayed]:
        """Compute what stands again from the base model and the facts; writes nothing.

        Args:
            base: The base model, without edits.
            drop: Lines to leave out; edits below all of them are as they were, and are read.
            methods: Methods that cannot be built from the ledger, such as those with a checkpoint.

        Raises:
            LedgerError: An edit cannot be computed again with what is there.
        """
        left_out = {self.entry(name).number for name in drop}
        first, again = min(left_out, default=0), Recomputation(base, methods)
        found: list[Replayed] = []
        check_bare(base)
        with base.edits.restored(), equations_kept():
            for number, saved in self.standing.items():
                line = self._added(number)
                if number in left_out:
                    continue
                if number < first:
                    edit = self.load(saved, base)
                else:
                    edit = again.edit(line, self._settings(line, base))
                apply_edits([edit])
                found.append(Replayed(line, edit, edit.id == saved.id))
        return found

    def copy(self, replayed: Sequence[Replayed], path: str | Path) -> Ledger:
        """A new ledger of edits that were computed again.

        Raises:
            LedgerError: There is one already.
        """
        new = Ledger(path)
        if new.lines:
            raise LedgerError(f"{new.path} holds a ledger already; name another folder")
        with new.writing():
            for line, edit, _ in replayed:
                number, parent = new._next()
                fresh = replace(line, number=number, parent=parent, run=None, id="")
                known = self.state.standing.get(line.number, line.edit)
                if edit.equations is None and (known.id, bool(known.equations)) == (edit.id, True):
                    edit.equations = read_equations(self.equations_path(known.id), known)
                new._append(replace(fresh, edit=new._save(edit), timing=_written_now()))
        return new

    # ---- verbs that ask

    def check(self, base: BaseModel) -> list[CheckedFact]:
        """Ask all facts that stand again: which hold, and what became of the others."""
        return check_facts(self, base)

    def blame(self, base: BaseModel, prompt: str, max_new_tokens: int = 20) -> Blame:
        """Which edits touch the answer to a prompt: each is left out alone."""
        return blame_answer(self, base, prompt, max_new_tokens)

    def diff(self, first: int | str, second: int | str) -> LedgerDiff:
        """What differs between the states after two lines; 0 is the state before all."""
        return compare_states(self, first, second)

    # ---- what writing consists of

    def write(
        self, method: Any, edit: Edit, random: Randomness, run: StreamPlace | None = None
    ) -> EditLine:
        """Write an edit down that was computed on top of those that stand.

        Raises:
            EditOrderError: It was computed on top of others.
        """
        if stack_mark(edit.origin.stack) != self.state.mark:
            raise EditOrderError(
                f"edit {edit.id} was computed apart from those that stand in {self.path}; a ledger "
                "holds edits that stand on each other (--trainer.protocol.mode sequential)"
            )
        saved = self._save(edit)
        line = EditLine(
            *self._next(),
            method=type(method).__name__,
            given=given_settings(method),
            learned=learned_hash(method),
            requests=edit.origin.requests,
            base_model=described_base(method.base, edit),
            edit=saved,
            random=random,
            run=run,
            timing=_written_now(),
        )
        return self._append(line)

    def _next(self) -> tuple[int, str]:
        return len(self.lines) + 1, self.lines[-1].id if self.lines else ROOT

    def _append(self, line: L) -> L:
        return self._read.append(self.file, line)

    def _save(self, edit: Edit) -> SavedEdit:
        path = self.edit_path(edit.id)
        edit.save(path)
        saved = SavedEdit(edit.id, _on_disk(path))
        if edit.equations is None:
            return saved
        path = self.equations_path(edit.id)
        save_equations(path, edit.equations)
        edit.equations = None  # it is large, and the file has it
        return replace(saved, equations=_on_disk(path))

    def _settings(self, line: EditLine, base: BaseModel) -> Mapping[str, Any]:
        saved = self.state.standing.get(line.number, line.edit)
        return self.load(saved, base).origin.settings

    def _how(self, number: int, base: BaseModel, asked: Later | None) -> Later:
        """Whether the edits above one are solved again or computed again, as is asked or can be."""
        try:
            check_solvable(self, number, base)
        except LedgerError:
            if asked is not None:
                raise
            return "replay"
        return "solve" if number != max(self.state.standing) or asked else "replay"


def _on_disk(path: Path) -> str:
    """Hash of a file, once the disk has it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.sha256(file.read()).hexdigest()


def _written_now() -> Mapping[str, Any]:
    return {"written": datetime.now().astimezone().isoformat(" ", "seconds")}
