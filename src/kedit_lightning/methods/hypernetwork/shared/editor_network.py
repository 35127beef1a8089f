"""The networks that map the gradient of a request to an edit, and the edits they compute."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import EditOrigin, LowRankDelta, LowRankEdit
from kedit_lightning.methods.shared.answer_passes import answered_rows
from kedit_lightning.methods.shared.gradient_factors import Factors, capture_factors
from kedit_lightning.methods.training.trained_network import Plan, TrainedNetwork
from kedit_lightning.requests import EditRequest

#: Copies of the factors of a gradient: themselves, what networks make of them, the edit.
_COPIES = 4


@dataclass(frozen=True)
class ProjectionPlan(Plan):
    """A plan of networks that edit projections, ``modules`` by name and in order."""

    modules: tuple[str, ...]


#: Low-rank deltas of several edits side by side, and the number of the edit that each rank-one term
#: belongs to, ``[rank]``; both by projection.
BatchedDeltas: TypeAlias = tuple[dict[str, LowRankDelta], dict[str, Tensor]]


class EditorNetwork(TrainedNetwork):
    """Maps requests and the rank-one factors of their gradients to deltas of projections."""

    plan: ProjectionPlan

    def update_statistics(self, factors: Sequence[Mapping[str, Factors]]) -> None:
        """Add the factors of a training step to running statistics, where there are any."""

    @abstractmethod
    def deltas(
        self,
        base: BaseModel,
        requests: Sequence[EditRequest],
        factors: Mapping[str, Factors],
        edit_of_row: Tensor,
    ) -> BatchedDeltas:
        """Deltas of the projections, on top of the edits on the base model's stack.

        ``factors`` of the gradients have a row for each request, and ``edit_of_row`` is the number
        of the edit that it belongs to, ``[requests]``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define deltas")


def edits_from_gradients(
    base: BaseModel,
    network: EditorNetwork,
    groups: Sequence[Sequence[EditRequest]],
    origins: Sequence[EditOrigin],
) -> list[LowRankEdit]:
    """One edit for each group of requests: one forward and one backward pass, mapped by networks.

    An edit does not depend on the other groups. Edits on the stack are in force. Running statistics
    do not change.
    """
    requests = [request for group in groups for request in group]
    counts = torch.tensor([len(group) for group in groups])
    edit_of_row = torch.arange(len(groups)).repeat_interleave(counts)
    factors = capture_factors(base, answered_rows(base, requests), network.plan.modules)
    with torch.no_grad():
        deltas, edit_of_term = network.deltas(base, requests, factors, edit_of_row)

    def own(name: str, number: int) -> LowRankDelta:
        kept = edit_of_term[name] == number
        return LowRankDelta(deltas[name].a[kept], deltas[name].b[:, kept])

    if len(groups) > 1:
        parts = [{name: own(name, number) for name in deltas} for number in range(len(groups))]
    else:
        parts = [deltas]
    return [LowRankEdit(base, part, origin) for part, origin in zip(parts, origins, strict=True)]


def bytes_of_edit(network: EditorNetwork, shapes: Sequence[tuple[int, int]], tokens: int) -> int:
    """Bytes that the factors of a request and its edit take while networks map them.

    Args:
        network: The networks.
        shapes: ``(d_in, d_out)`` of the edited projections.
        tokens: Tokens of the request's row.
    """
    size = max(parameter.element_size() for parameter in network.parameters())
    return _COPIES * tokens * size * sum(d_in + d_out for d_in, d_out in shapes)
