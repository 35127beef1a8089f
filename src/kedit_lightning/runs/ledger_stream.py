"""A run of ``kedit edit`` that writes into a ledger, and goes on where one was ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kedit_lightning.base_models import BaseModel
from kedit_lightning.contradictions import consistent, remaining
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.edits import Edit
from kedit_lightning.edits.kept_equations import equations_kept
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.errors import InvalidRequestError, LedgerError, UnsupportedUseError
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.requests import EditRequest
from kedit_lightning.runs.ledger import Ledger
from kedit_lightning.runs.ledger_facts import FactIndex, new_facts
from kedit_lightning.runs.ledger_lines import EditLine, Randomness, SavedEdit, StreamPlace, standing
from kedit_lightning.runs.recomputation import given_settings
from kedit_lightning.runs.results import tell


class LedgerStream:
    """The edits that a run adds to a ledger; those that a run of the same facts added are taken.

    Args:
        ledger: The ledger.
        method: The editing method.
        data: Where the facts come from.
    """

    resumed = True

    def __init__(self, ledger: Ledger, method: Any, data: EditDataModule) -> None:
        self.ledger, self.method = ledger, method
        examples, protocol = data.examples("test"), method.run.protocol
        facts = EditOrigin(requests=tuple(r for e in examples for r in e.requests)).to_json()
        asked = [type(method).__name__, given_settings(method), method.run.seed, facts["requests"]]
        asked += [protocol.mode, protocol.written_at_once]
        key = hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:16]
        last = ledger.lines[-1] if ledger.lines else None
        run = last.run if isinstance(last, EditLine) else None
        #: The run that goes on, or a new one.
        self.place = run if run and run.key == key else StreamPlace(key, len(ledger.lines))
        self.done = {
            line.random.name: line.edit
            for line in ledger.lines[self.place.start :]
            if isinstance(line, EditLine)
        }
        before = standing(ledger.lines[: self.place.start])
        self.below: dict[int, SavedEdit] = before
        stand = [r for line in ledger.entries if line.number in before for r in line.requests]
        wanted = remaining(examples, method.run.left_out)
        conflict = protocol.on_conflict
        new = set(map(id, new_facts(FactIndex(stand), wanted, ledger.path, conflict)))
        if not new:
            raise InvalidRequestError(f"{ledger.path} holds all of these facts already")
        #: Facts that stand already: the id of their example, and their place in it.
        self.known = frozenset(
            (example.id, place)
            for example in examples
            for place, request in enumerate(example.requests)
            if id(request) not in new
        )

    def record(self, id: str, stage: str) -> ExampleRecord | None:
        """None: facts are scored anew by each run."""

    def has_edit(self, name: str) -> bool:
        """Whether a run of the same facts has written an edit."""
        return name in self.done

    def edit(self, name: str, base: BaseModel, requests: Sequence[EditRequest]) -> Edit | None:
        """An edit that a run of the same facts has written.

        Raises:
            LedgerError: It writes other facts.
        """
        if name not in self.done:
            return None
        edit = self.ledger.load(self.done[name], base)
        if edit.origin.requests != tuple(consistent(requests)):
            raise LedgerError(
                f"'{name}' of this run writes other facts than the ledger in {self.ledger.path} "
                "says; revert what that run wrote, and start it again"
            )
        return edit

    def take(self, name: str, edit: Edit) -> None:
        """Write down an edit that has been computed."""
        random = Randomness(self.method.run.seed, name)
        self.ledger.write(self.method, edit, random, self.place)


@contextmanager
def ledger_stream(
    path: str | Path | None,
    method: Any,
    data: Any,
    others: Sequence[object] = (),
    processes: int = 1,
) -> Iterator[None]:
    """Inside, edits are computed on top of those of a ledger, and written into it.

    Args:
        path: The folder of the ledger, if one was named.
        method: The editing method, to whose run the ledger is attached.
        data: Where the facts come from.
        others: Options that keep edits elsewhere, which must be absent.
        processes: Number of processes of the run.

    Raises:
        UnsupportedUseError: There are such options, or each fact gets an edit of its own.
        InvalidRequestError: All facts stand already.
    """
    if path is None:
        yield
        return
    if any(other is not None for other in others):
        raise UnsupportedUseError(
            "--ledger keeps the edits itself, goes on where a run was ended when the command is "
            "given again, and takes fitted methods by --model.checkpoint; leave out --output, "
            "--resume, --export and --ckpt_path (`kedit export` writes the edited model)"
        )
    if processes > 1:
        raise UnsupportedUseError(
            f"a ledger is written by one process, and the run has {processes}; leave out "
            "--trainer.devices and --trainer.num_nodes, or start it without torchrun (one process "
            "computes the edits of a sequence in any case)"
        )
    if not str(path):
        raise UnsupportedUseError("the name of the ledger is empty; give a folder to --ledger")
    if not isinstance(data, EditDataModule):
        raise UnsupportedUseError("a ledger needs facts of a data module, such as Requests")
    if method.run.protocol.mode == "single" and len(data.examples("test")) > 1:
        raise UnsupportedUseError(
            "a ledger holds edits that stand on each other, and --trainer.protocol.mode single "
            "computes them apart; use sequential or batch"
        )
    method.check_examples(data.examples("test"))  # before a model is loaded
    ledger = Ledger(path)
    with ledger.writing():
        stream = LedgerStream(ledger, method, data)
        taken = method.run.on_edit

        def take(name: str, edit: Edit) -> None:
            stream.take(name, edit)
            taken(name, edit)

        run = replace(method.run, ledger=stream, left_out=stream.known, on_edit=take)
        method.run = run
        with ledger.applied(method.base, stream.below), equations_kept():
            yield
    stand = len(ledger.standing)
    tell(f"{stand} edit{'s stand' if stand != 1 else ' stands'} in {ledger.path}")
