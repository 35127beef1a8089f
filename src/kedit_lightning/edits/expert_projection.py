"""Down projections of experts under names of their own, as modules that edits can change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kedit_lightning.edits.experts import FORMS, RoutedExperts


class ExpertProjection(nn.Module):
    """The down projection of one expert, or of all of them together.

    Together they are one matrix ``[d_out, experts · d_in]``, whose key is that of all experts in a
    row, each times its weight and 0 where it is not picked.

    Args:
        experts: The experts.
        owner: Name of the module that holds them.
        expert: Number of the one, or ``None`` for all.
    """

    def __init__(self, experts: RoutedExperts, owner: str, expert: int | None) -> None:
        super().__init__()
        self.experts, self.owner, self.expert = experts, owner, expert

    @property
    def fused_name(self) -> str:
        """Name of the parameter that holds it."""
        return f"{self.owner}.{self.experts.parameter}"

    @property
    def numbers(self) -> range:
        """Numbers of the experts that it is the projection of."""
        count = self.experts.count
        return range(count) if self.expert is None else range(self.expert, self.expert + 1)

    def name_of(self, expert: int) -> str:
        """Name of the projection of one expert."""
        return f"{self.fused_name}.{expert}"

    @property
    def weight(self) -> Tensor:
        """Its matrix. Shape ``[d_out, d_in]``."""
        matrices = self.experts.matrices(self.experts.fused)
        if self.expert is None:
            return matrices.transpose(0, 1).flatten(1)
        return matrices[self.expert]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the one expert, ``[d_out]``."""
        biases = self.experts.biases
        return None if biases is None or self.expert is None else biases[1][self.expert]

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_in, d_out)``."""
        count, d_out, d_in = self.experts.matrices(self.experts.fused).shape
        return (count if self.expert is None else 1) * d_in, d_out

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters that hold it."""
        fused = self.experts.fused
        assert isinstance(fused, nn.Parameter)
        yield fused

    def gated_keys(self, args: Sequence[Any]) -> Tensor:
        """Its keys times weights, from the arguments of the experts' call. ``[tokens, d_in]``."""
        routing = self.experts.routing(args)
        return torch.cat([self.experts.gated_keys(routing, e) for e in self.numbers], dim=1)

    def of_parameters(self, dense: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
        """A change of one expert as one of the whole parameters, by name inside the owner."""
        assert self.expert is not None
        parts: dict[str, Tensor] = {}
        if dense is not None:
            whole = torch.zeros_like(self.experts.fused, dtype=dense.dtype, device=dense.device)
            self.experts.matrices(whole)[self.expert] = dense
            parts[self.experts.parameter] = whole.detach()
        if bias is not None and self.experts.biases is not None:
            name, biases = self.experts.biases
            parts[name] = torch.zeros_like(biases, dtype=bias.dtype, device=bias.device)
            parts[name][self.expert] = bias
        return parts


def places_of_experts(name: str) -> Iterator[tuple[str, str, int | None]]:
    """What the name of a projection of experts may mean: owner, parameter and number."""
    stem, _, last = name.rpartition(".")
    readings = [(stem, int(last))] if last.isdecimal() else []
    for path, expert in (*readings, (name, None)):
        for parameter in dict.fromkeys(form.parameter for form in FORMS):
            if path.endswith(f".{parameter}"):
                yield path.removesuffix(f".{parameter}"), parameter, expert
