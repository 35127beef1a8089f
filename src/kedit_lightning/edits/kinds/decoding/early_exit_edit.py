"""Edits that choose the next token with the help of what earlier layers would say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from kedit_lightning.edits.edit import EditableModel, Tensors, Values
from kedit_lightning.edits.kinds.decoding.decoding_edit import DecodingEdit
from kedit_lightning.edits.kinds.decoding.layer_contrast import deco, dola
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.projections import find_module
from kedit_lightning.edits.state_schema import check_names, check_value
from kedit_lightning.errors import EditFileError


@dataclass(frozen=True)
class EarlyExits:
    """Hidden states that are turned into logits, and how.

    Args:
        modules: Names of the modules whose outputs are read, from the first layer on.
        unembedding: Names of the modules that turn a hidden state into logits, in their order.
        scale: What the model multiplies its logits by.
        soft_cap: ``logits -> soft_cap * tanh(logits / soft_cap)``, if the model has one.
    """

    modules: tuple[str, ...]
    unembedding: tuple[str, ...]
    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, base: EditableModel, states: Mapping[str, Tensor]) -> Tensor:
        """Logits of hidden states ``[n, hidden]`` by module name. ``[layers, n, vocab]``."""
        hidden = torch.stack([states[name] for name in self.modules])
        for name in self.unembedding:
            hidden = find_module(base.model, name)(hidden)
        logits = _in_full(hidden) * self.scale
        return logits if self.soft_cap is None else self.soft_cap * (logits / self.soft_cap).tanh()


@dataclass(frozen=True)
class DoLaPlan:
    """Settings of :func:`~kedit_lightning.edits.kinds.decoding.layer_contrast.dola`."""

    exits: EarlyExits
    relative_top: float
    legacy_divergence: bool = False

    def combined(self, logits: Tensor, early: Tensor) -> Tensor:
        """Scores ``[n, vocab]`` of logits ``[n, vocab]`` and early ``[layers, n, vocab]``."""
        return dola(logits, early, self.relative_top, self.legacy_divergence)


@dataclass(frozen=True)
class DeCoPlan:
    """Settings of :func:`~kedit_lightning.edits.kinds.decoding.layer_contrast.deco`."""

    exits: EarlyExits
    alpha: float
    top_p: float
    top_k: int

    def combined(self, logits: Tensor, early: Tensor) -> Tensor:
        """Scores ``[n, vocab]`` of logits ``[n, vocab]`` and early ``[layers, n, vocab]``."""
        return deco(logits, early, self.alpha, self.top_p, self.top_k)


class EarlyExitEdit(DecodingEdit):
    """Combines the logits of the last layer with those of earlier ones, by a plan.

    It acts in every call of the model: teacher-forced scores, greedy answers, sampling and beams,
    with and without a cache.

    Args:
        base: The base model.
        plan: The earlier layers, and how their logits are combined.
        origin: Where the edit comes from.

    Raises:
        UnsupportedUseError: The base model has no such layers.
    """

    plan_type: ClassVar[type[DoLaPlan | DeCoPlan]]

    def __init__(
        self, base: EditableModel, plan: DoLaPlan | DeCoPlan, origin: EditOrigin | None = None
    ) -> None:
        super().__init__(base, origin)
        self.plan = plan
        for name in (*plan.exits.modules, *plan.exits.unembedding):
            find_module(base.model, name)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the modules whose outputs are read."""
        return self.plan.exits.modules

    def adjust(self, logits: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """Combine logits ``[n, vocab]`` with those of earlier layers."""
        early = self.plan.exits.logits(self.base, states)
        return self.plan.combined(_in_full(logits), early.to(logits.device))

    def state(self) -> tuple[Tensors, Values]:
        """Names and settings; there are no tensors."""
        return {}, asdict(self.plan)

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> Self:
        """Rebuild from names and settings."""
        check_names("the edit", tensors, ())
        check_value("the edit", values, cls.plan_type)
        exits = {**values["exits"]}
        exits |= {name: tuple(exits[name]) for name in ("modules", "unembedding")}
        if not exits["modules"]:
            raise EditFileError("the edit reads no layer")
        return cls(base, cls.plan_type(**{**values, "exits": EarlyExits(**exits)}), origin)


class DoLaEdit(EarlyExitEdit):
    """Scores tokens by how much likelier the last layer makes them than an earlier one."""

    kind: ClassVar[str] = "dola"
    plan_type = DoLaPlan


class DeCoEdit(EarlyExitEdit):
    """Corrects the last layer by the layer before it that is surest of a likely token."""

    kind: ClassVar[str] = "deco"
    plan_type = DeCoPlan


def _in_full(logits: Tensor) -> Tensor:
    """Logits in float32 at least: differences of logarithms need it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
