"""Edits that change how the next token is chosen."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from kedit_lightning.edits.edit import Edit


class DecodingEdit(Edit):
    """Changes the logits from which the next token is chosen.

    It acts where the base model scores answers and decodes, never by patching ``forward``.
    """

    rows_apart: ClassVar[bool] = False

    @abstractmethod
    def adjust(self, logits: Tensor) -> Tensor:
        """Change next-token logits of shape ``[..., vocab]``."""
