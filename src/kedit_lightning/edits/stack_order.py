"""Whether an edit goes on top of the edits that are there."""

from __future__ import annotations

import warnings

from kedit_lightning.edits.edit import Edit
from kedit_lightning.edits.stack_chain import StackMark, described, stack_mark
from kedit_lightning.errors import EditOrderError


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
