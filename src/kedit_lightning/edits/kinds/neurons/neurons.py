"""Keys, biases and values of neurons that are added beside an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class MLPPlace(NamedTuple):
    """Where neurons stand: the module whose input they read, and the one whose output they change.

    They are the first and the last projection of one MLP.
    """

    reads: str
    writes: str


@dataclass(frozen=True)
class Neurons:
    """Keys ``[n, d_in]``, biases ``[n]``, values ``[n, d_out]``, and the queries of the facts.

    A neuron adds ``relu(x·key + bias)·value`` to the output of its MLP, whatever the activation of
    the MLP's own neurons is, so that it is exactly zero wherever it does not fire.  Queries,
    ``[m, d_in]``, are inputs of the MLP that the neurons were made for; later edits keep their own
    neurons silent on these.
    """

    keys: Tensor
    biases: Tensor
    values: Tensor
    queries: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Neurons]) -> Neurons:
        """All neurons of several sets, in their order."""
        return cls(
            *(torch.cat(tensors) for tensors in zip(*(p.tensors for p in parts), strict=True))
        )

    def __len__(self) -> int:
        return len(self.biases)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Its tensors in the order of the fields."""
        return self.keys, self.biases, self.values, self.queries

    def to(self, target: torch.device | torch.dtype) -> Neurons:
        """The same on another device, or in another dtype."""
        return Neurons(*(tensor.to(target) for tensor in self.tensors))

    def activations(self, x: Tensor) -> Tensor:
        """``relu(x·key + bias)``. Shape ``[..., n]`` from ``[..., d_in]``."""
        return torch.relu(x @ self.keys.T + self.biases)

    def change(self, activations: Tensor) -> Tensor:
        """What is added to the output of the MLP. Shape ``[..., d_out]`` from ``[..., n]``."""
        return activations @ self.values
