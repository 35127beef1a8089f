"""Edits that answer the questions in their scope with a model of their own (SERAC)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch

from kedit_lightning.edits.edit import EditableModel, MemoryEdit, Tensors, Values, check_finite
from kedit_lightning.edits.effects import ChangeLogits, Effect, ReadStates
from kedit_lightning.edits.kinds.scope.scope_memory import (
    ScopeAnswers,
    ScopeContent,
    ScopeEntry,
    ScopeRouter,
)
from kedit_lightning.edits.kinds.scope.scope_networks import ScopeNetworks, ScopePlan
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.errors import EditFileError

_NETWORK = "network."


class ScopeEdit(MemoryEdit):
    """Facts of a SERAC memory; all applied edits with equal networks form one memory.

    The base model runs as ever.  While it reads a prompt, the output of one of its blocks tells
    which fact, if any, the question is about.  The logits of rows in scope are then replaced by
    those of the counterfactual model; rows out of scope keep the tensors of the base model.

    The networks are saved with each edit, so that its file needs no other file.

    Args:
        base: The base model.
        networks: Scope classifier and counterfactual model; they must not be trained further.
        entries: The facts.
        origin: Where the edit comes from.
    """

    kind: ClassVar[str] = "scope"

    def __init__(
        self,
        base: EditableModel,
        networks: ScopeNetworks,
        entries: Sequence[ScopeEntry],
        origin: EditOrigin | None = None,
    ) -> None:
        super().__init__(base, origin)
        self.networks = networks.requires_grad_(False).eval()
        self.entries = tuple(entries)
        module = networks.plan.module
        if module not in dict(base.model.named_modules()):
            raise EditFileError(
                f"a scope edit reads the block '{module}', which '{base.name}' does not have"
            )
        for entry in self.entries:
            check_finite("scope key", module, entry.key)

    @cached_property
    def family(self) -> str:
        """The memory that this edit is part of: the hash of its networks."""
        return self.networks.digest()

    def effects(self) -> Sequence[Effect]:
        """The routing of questions at a block, and the answers to those in scope."""
        content = ScopeContent(self.id, self.family, self.networks, self.entries, self.base)
        module = self.networks.plan.module
        return [
            ReadStates(module, self.family, ScopeRouter, content),
            ChangeLogits(self.family, ScopeAnswers, content),
        ]

    def state(self) -> tuple[Tensors, Values]:
        """Keys as a matrix, the networks, and the statements as plain values."""
        tensors = {"keys": torch.stack([entry.key for entry in self.entries])}
        for name, tensor in self.networks.state_dict().items():
            tensors[_NETWORK + name] = tensor
        return tensors, {
            "plan": self.networks.plan.to_json(),
            "statements": [list(entry.statement) for entry in self.entries],
            "thresholds": [entry.threshold for entry in self.entries],
        }

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> ScopeEdit:
        """Rebuild networks and entries."""
        plan, keys = ScopePlan(**values["plan"]), tensors["keys"]
        networks = ScopeNetworks(plan, dtype=keys.dtype)
        networks.load_state_dict(
            {n.removeprefix(_NETWORK): t for n, t in tensors.items() if n.startswith(_NETWORK)}
        )
        entries = [
            ScopeEntry(key, tuple(ids), threshold)
            for key, ids, threshold in zip(
                keys, values["statements"], values["thresholds"], strict=True
            )
        ]
        return cls(base, networks, entries, origin)
