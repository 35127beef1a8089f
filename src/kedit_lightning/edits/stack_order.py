"""Whether an edit goes on top of the edits that are there, or into rows of a pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from kedit_lightning.edits.edit import Edit
from kedit_lightning.edits.stack_chain import StackMark, described, stack_mark
from kedit_lightning.errors import EditOrderError, UnsupportedUseError


def common_beginning(first: Sequence[Edit], second: Sequence[Edit]) -> int:
    """How many edits two stacks have in common, from the bottom."""
    length = min(len(first), len(second))
    if first is second or first[:length] == second[:length]:
        return length
    return next(n for n in range(length) if first[n] is not second[n])


def check_order(edit: Edit, below: StackMark) -> None:
    """Warn of an edit that was computed on top of other edits; one with a memory is refused.

    Raises:
        EditOrderError: The edit depends on the stack it was computed on.
    """
    made_on = edit.origin.stack
    if not edit.origin.method or stack_mark(made_on) == below:
        return
    there, here = described(made_on), described(below)
    if edit.requires_its_stack:
        raise EditOrderError(
            f"edit {edit.id} by {edit.origin.method} depends on the edits it was computed on "
            f"({there}), but the stack holds {here}; apply those first, in that order, or compute "
            "the edit again"
        )
    warnings.warn(
        f"edit {edit.id} by {edit.origin.method} was computed on top of {there}, and is applied on "
        f"top of {here}; its scores may differ from those reported for it",
        stacklevel=5,
    )


def check_carried(edits: Iterable[Edit], below: StackMark) -> None:
    """Make sure that rows of one pass can carry edits on top of a stack.

    Raises:
        UnsupportedUseError: One acts where rows are not told apart.
        EditOrderError: One depends on the stack it was computed on.
    """
    for edit in dict.fromkeys(edits):
        check_order(edit, below)
        for part in edit.parts():
            if not part.rows_apart:
                raise UnsupportedUseError(
                    f"edit {part.id} of kind '{part.kind}' acts on prompts or on decoding, "
                    "where rows are not told apart; apply it by itself"
                )
