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


def edit_from_gradient(
    base: BaseModel, network: EditorNetwork, requests: Sequence[EditRequest], origin: EditOrigin
) -> LowRankEdit:
    """One edit of all requests: one forward and one backward pass, mapped by the networks.

    Edits on the stack are in force. Running statistics do not change.
    """
    rows = answered_rows(base, requests)
    factors = capture_factors(base, rows, network.plan.modules)
    with torch.no_grad():
        together = torch.zeros(len(requests), dtype=torch.long)
        deltas, _ = network.deltas(base, requests, factors, together)
    return LowRankEdit(base, deltas, origin)
