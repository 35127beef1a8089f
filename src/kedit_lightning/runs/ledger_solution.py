"""The edits of a ledger without one of those below them, solved again instead of computed again.

What each edit asks is kept: the keys of its projections, and the outputs that it wants there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import Edit
from kedit_lightning.edits.edit_file import write_atomically
from kedit_lightning.edits.effects import AddToOutput, KeepMemory, of_type
from kedit_lightning.edits.origin import TARGET_PROBABILITIES
from kedit_lightning.edits.projections import find_module, projection_shape
from kedit_lightning.edits.stack_chain import StackChain
from kedit_lightning.errors import EditFileError, LedgerError
from kedit_lightning.runs.ledger_lines import EditLine, SavedEdit, checked_file
from kedit_lightning.runs.ledger_record import LedgerRecord
from kedit_lightning.runs.recomputation import Recomputation


class Solved(NamedTuple):
    """An edit that was solved again, with what it was solved from.

    Args:
        line: The line that added it.
        edit: The new edit, not applied.
    """

    line: EditLine
    edit: Edit


def save_equations(path: Path, equations: Mapping[str, Tensor]) -> None:
    """Write what an edit was solved from."""
    write_atomically(path, save(dict(equations)))


def read_equations(path: Path, saved: SavedEdit) -> dict[str, Tensor]:
    """What an edit of a ledger was solved from.

    Raises:
        EditFileError: The file is absent, or has changed.
    """
    try:
        return load_file(checked_file(path, saved.equations, lambda: f"equations of {saved.id}"))
    except (SafetensorError, OSError) as error:
        raise EditFileError(f"{path} cannot be read: {error}") from error


def check_solvable(ledger: LedgerRecord, number: int, base: BaseModel) -> None:
    """Make sure that the edits above one can be solved without it.

    Raises:
        LedgerError: The message names the line that cannot.
    """
    now = ledger.state.standing
    for later, saved in now.items():
        if later > number and not saved.equations:
            raise LedgerError(
                f"line {later} holds no equations to solve again (those of MEMIT, PMET, EMMET, "
                "AlphaEdit, ROME, RROME, UltraEdit, MALMEN and RLEdit do); let it be computed "
                "again from its facts, with --replay (later='replay' in Python)"
            )
    effects = ledger.load(now[number], base).effects()
    if not all(isinstance(effect, AddToOutput | KeepMemory) for effect in effects):
        raise LedgerError(
            f"the edit of line {number} does more than change weights, so that those above cannot "
            "be solved without it; let them be computed again from their facts, with --replay "
            "(later='replay' in Python)"
        )


def solved_without(
    ledger: LedgerRecord, number: int, base: BaseModel, methods: Recomputation
) -> Iterator[Solved]:
    """The edits above one, as if it had never been, with their keys and wanted outputs.

    Args:
        ledger: The ledger, whose edits are solvable (:func:`check_solvable`).
        number: The line of the edit that is left out.
        base: The base model.
        methods: The methods of the ledger.
    """
    now = ledger.state.standing
    below = [saved for n, saved in now.items() if n < number]
    gone = ledger.load(now[number], base)
    missing: dict[str, Tensor] = {}
    _add(missing, gone, 1)
    chain = StackChain([saved.id for saved in below])
    past: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
    after = ledger.load_all([saved for n, saved in now.items() if n > number], base)
    if any(edit.requires_its_stack for edit in after):
        for edit in ledger.load_all(below, base):
            _remember(past, edit)
    lines = [line for line in ledger.entries if line.number > number]
    for line, old in zip(lines, after, strict=True):
        saved = now[line.number]
        equations = read_equations(ledger.equations_path(saved.id), saved)
        new: Any = None
        if equations:
            old.equations = equations
            method = methods.method(line, old.origin.settings)
            new = method.solved_again(old, past[old.origin.method], missing)
            old.equations = None
        else:
            new = old.rebuilt_on(base)
            new.equations = {}
        notes = {n: v for n, v in old.origin.notes.items() if n != TARGET_PROBABILITIES}
        notes["solved_again"] = notes.get("solved_again", 0) + 1
        new.origin = replace(old.origin, stack=chain.mark, notes=notes)
        _add(missing, old, 1)
        _add(missing, new, -1)
        _remember(past, new)
        chain.extend([new.id])
        yield Solved(line, new)


def _add(total: dict[str, Tensor], edit: Edit, sign: int) -> None:
    """Add the change of each projection by an edit. Shape ``[d_out, d_in]``, float64."""
    for effect in of_type(edit.effects(), AddToOutput):
        if effect.module not in total:
            module = find_module(edit.base.model, effect.module)
            shape = projection_shape(module)[::-1]
            total[effect.module] = torch.zeros(shape, dtype=torch.float64)
        change = effect.delta.matrix(total[effect.module])
        if change is not None:
            total[effect.module] = total[effect.module] + sign * change


def _remember(past: dict[str, list[dict[str, Tensor]]], edit: Edit) -> None:
    for memory in of_type(edit.effects(), KeepMemory):
        past[memory.method].append(memory.tensors)
