"""Prompts that a base model has read without edits, for what is read of them under edits."""

from __future__ import annotations

from collections.abc import Sequence

from kedit_lightning.base_models.base_model import BaseModel
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.base_models.shared_prompts import SharedPrompts

#: Bytes of caches of prompts, and of outputs of blocks, that are kept.
_KEPT_BYTES = 1 << 28


class PlainPrompts:
    """Caches of prompts that the base model has read without edits, as long as they are small."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._known: dict[tuple[tuple[int, ...], ...], SharedPrompts] = {}
        self._bytes = 0

    def known(self, prompts: Sequence[EncodedRow]) -> SharedPrompts | None:
        """The cache of some prompts, in this order, where it is known."""
        return self._known.get(tuple(row.prompt for row in prompts))

    def of(self, prompts: Sequence[EncodedRow]) -> SharedPrompts:
        """The same, read where it is not known; edits must be suspended."""
        found = self.known(prompts)
        if found is None:
            found = SharedPrompts(self._base, prompts)
            if found.nbytes > _KEPT_BYTES:
                found.forget_outputs()
            if self._bytes + found.nbytes > _KEPT_BYTES:
                self.clear()
            if found.nbytes <= _KEPT_BYTES:
                key = tuple(row.prompt for row in prompts)
                self._known[key], self._bytes = found, self._bytes + found.nbytes
        return found

    def clear(self) -> None:
        """Forget all."""
        self._known, self._bytes = {}, 0
