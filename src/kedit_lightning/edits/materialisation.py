"""Copies of a base model with edits written into its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from kedit_lightning.edits.projections import compute_dtype, find_module, is_transposed
from kedit_lightning.edits.weight_storage import (
    dense_copy,
    loaded,
    quantisation,
    quantisation_of,
    write_weight,
)
from kedit_lightning.errors import UnsupportedUseError


class WeightChange(Protocol):
    """The part of an edit that can be written into weights."""

    def deltas(self) -> dict[str, Tensor]:
        """Change of each parameter, dense and in the parameter's own orientation."""


T = TypeVar("T")
#: One edit, or several in their order.
OneOrSeveral: TypeAlias = T | Iterable[T]


def edits_in(given: OneOrSeveral[T]) -> list[T]:
    """Edits in their order, whether one or several were given."""
    return list(given) if isinstance(given, Iterable) else [given]


class RestorableStack(Protocol):
    """The part of a stack of edits by which a clean model is copied."""

    def restored(self) -> AbstractContextManager[None]:
        """On leaving, the stack is as it was on entering."""

    def clear(self) -> None:
        """Roll all edits back."""


class WritableModel(Protocol):
    """The part of a base model that can be copied and written to."""

    name: str
    model: nn.Module

    @property
    def dtype(self) -> torch.dtype:
        """Number type of its hidden states."""

    @property
    def edits(self) -> RestorableStack:
        """The edits now applied to it."""


def sum_of_deltas(edits: OneOrSeveral[WeightChange]) -> dict[str, Tensor]:
    """Changes of parameters by edits, added up in at least float32.

    Raises:
        UnsupportedUseError: An edit changes no weights.
    """
    totals: dict[str, Tensor] = {}
    for edit in edits_in(edits):
        for name, delta in edit.deltas().items():
            delta = delta.to(compute_dtype(delta.dtype))
            totals[name] = totals[name] + delta if name in totals else delta
    return totals


def check_plain_weights(model: nn.Module, label: str) -> None:
    """Make sure that the weights of a model, called ``label`` in messages, can hold an edit.

    Raises:
        UnsupportedUseError: They are quantised; the message says how.
    """
    kind = quantisation_of(model)
    if kind is not None:
        raise UnsupportedUseError(
            f"the weights of '{label}' are quantised ({kind}) and cannot hold an edit exactly; "
            "keep it as a file and apply it, load the model without quantization to export it, or "
            "write a dequantised copy: materialise(base, edits, dequantise=True) in Python"
        )


@torch.no_grad()
def with_delta(parameter: Tensor, delta: Tensor) -> Tensor:
    """A parameter changed by a delta and rounded once, after all edits have been added up."""
    total = parameter.to(compute_dtype(parameter.dtype)) + delta.to(parameter.device)
    return total.to(parameter.dtype)


@torch.no_grad()
def materialise(
    base: WritableModel, edits: OneOrSeveral[WeightChange], dequantise: bool = False
) -> nn.Module:
    """A copy of the base model with the edits written into its weights.

    What is offloaded stays so, but for the tensors that are written.

    Args:
        base: The base model.
        edits: The edits, or one; they need not be applied.
        dequantise: Write a quantised model as a plain one, in the number type it computes in.

    Raises:
        UnsupportedUseError: An edit changes no weights, or the weights are quantised and are not to
            be dequantised.
    """
    if not dequantise:
        check_plain_weights(base.model, base.name)
    totals = sum_of_deltas(edits)
    with base.edits.restored():
        base.edits.clear()
        # Not all that is quantised can be copied, so plain projections are put in place before.
        parts = [part for part in base.model.modules() if dequantise and quantisation(part)]
        plain = {id(part): dense_copy(part, base.dtype) for part in parts}
        clone = copy.deepcopy(base.model, plain)
    if dequantise:
        _forget_quantisation(clone)
    for name, delta in totals.items():
        owner, _, own = name.rpartition(".")
        module = find_module(clone, owner)
        turned = is_transposed(module) and not is_transposed(find_module(base.model, owner))
        if turned and own == "weight":  # what was quantised was stored as Linear stores it
            delta = delta.T
        with loaded(module):
            changed = with_delta(module.get_parameter(own), delta)
        write_weight(module, own, changed)
    return clone


def _forget_quantisation(model: Any) -> None:
    """Take away what says of a plain model that it is quantised."""
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit"):
        if name in vars(model):
            delattr(model, name)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
