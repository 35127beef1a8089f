"""Edits that change how the next token is chosen."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from kedit_lightning.edits.edit import Edit
from kedit_lightning.edits.effects import ChangeLogits, Effect, LogitsFunction, Places
from kedit_lightning.edits.row_context import RowContext


class DecodingEdit(Edit):
    """Changes the logits from which the next token is chosen, in any call of the model."""

    rows_apart: ClassVar[bool] = False

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of modules whose hidden states :meth:`adjust` needs; none by default."""
        return ()

    @abstractmethod
    def adjust(self, logits: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """Change next-token logits ``[n, vocab]``.

        Args:
            logits: Shape ``[n, vocab]``.
            states: Output of the modules in :attr:`reads` at the same tokens, ``[n, hidden]`` each.
        """

    def effects(self) -> Sequence[Effect]:
        """The change of logits."""
        return [ChangeLogits(self, _adjustments, self, self.reads)]


def _adjustments(edits: Sequence[DecodingEdit]) -> LogitsFunction:
    def adjust(logits: Tensor, places: Places, context: RowContext) -> Tensor:
        for edit in edits:
            logits = edit.adjust(logits, places.states)
        return logits

    return adjust
