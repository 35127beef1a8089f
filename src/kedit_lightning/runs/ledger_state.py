"""What stands in a ledger, kept up line by line."""

from __future__ import annotations

from collections.abc import Sequence

from kedit_lightning.edits.stack_chain import StackChain, StackMark
from kedit_lightning.runs.ledger_facts import FactIndex
from kedit_lightning.runs.ledger_lines import EditLine, Line, SavedEdit, advance


class LedgerState:
    """What stands after some lines; another line takes as long after ten thousand as after ten.

    A line that reverts changes all that stands above, so what follows from it is built again.
    """

    def __init__(self) -> None:
        self._lines: Sequence[Line] = ()
        self._counted = 0
        #: The edits that stand, by the number of the line that added each.
        self.standing: dict[int, SavedEdit] = {}
        self._chain: StackChain | None = None
        self._facts: FactIndex | None = None

    def follow(self, lines: Sequence[Line]) -> LedgerState:
        """Take lines into account that were added behind those known."""
        if lines is not self._lines or len(lines) < self._counted:
            self._lines, self._counted, self.standing = lines, 0, {}
            self._chain = self._facts = None
        for line in lines[self._counted :]:
            advance(self.standing, line)
            if not isinstance(line, EditLine):
                self._chain = self._facts = None
                continue
            if self._chain is not None:
                self._chain.extend([line.edit.id])
            if self._facts is not None:
                self._facts.add(line.requests)
        self._counted = len(lines)
        return self

    @property
    def mark(self) -> StackMark:
        """What an edit on top of those that stand says of them."""
        if self._chain is None:
            self._chain = StackChain([saved.id for saved in self.standing.values()])
        return self._chain.mark

    @property
    def facts(self) -> FactIndex:
        """The facts that stand."""
        if self._facts is None:
            numbers = [self._lines[number - 1] for number in self.standing]
            self._facts = FactIndex(
                r for x in numbers if isinstance(x, EditLine) for r in x.requests
            )
        return self._facts
