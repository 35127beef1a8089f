"""What training and editing ask of a network that proposes edits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.methods.hypernetwork.shared.attach import LowRankChange
from kedit_lightning.methods.shared.gradient_factors import Factors
from kedit_lightning.methods.training.learned import LearnedNetwork, Plan
from kedit_lightning.requests import EditRequest


@dataclass(frozen=True)
class ProjectionPlan(Plan):
    """A plan of networks that edit projections.

    Args:
        modules: The projections they edit, in order.
    """

    modules: tuple[str, ...]


class ProposingNetwork(LearnedNetwork):
    """Turns requests and the factors of their gradients into changes of projections.

    Args:
        plan: What it is made of.
    """

    plan: ProjectionPlan

    def observe(self, captured: Sequence[Mapping[str, Factors]]) -> None:
        """Take the factors of a training step into statistics, where there are any."""

    @abstractmethod
    def propose(
        self,
        base: BaseModel,
        requests: Sequence[EditRequest],
        factors: Mapping[str, Factors],
        edit_of_row: Tensor,
    ) -> dict[str, LowRankChange]:
        """Changes by projection, computed on top of the edits on the base model's stack.

        Args:
            base: The base model.
            requests: The requests.
            factors: Factors of their gradients by projection, a row for each request.
            edit_of_row: Number of the edit that each request goes into. Shape ``[requests]``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define propose")
