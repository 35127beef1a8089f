"""Editing of neurons in rounds, with values of the original weights (NSE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import LowRankDelta
from kedit_lightning.methods.capabilities import Count, NotNegative, PositiveShare
from kedit_lightning.methods.locate.shared import least_squares
from kedit_lightning.methods.locate.shared.closed_form import ClosedForm
from kedit_lightning.methods.locate.shared.closed_form_settings import LayersSettings
from kedit_lightning.methods.locate.shared.edit_groups import EditGroups
from kedit_lightning.methods.locate.shared.subject_states import SubjectStates
from kedit_lightning.methods.locate.shared.value_targets import LastLayerValues
from kedit_lightning.requests import EditRequest


@dataclass(frozen=True)
class NSESettings(LayersSettings):
    """Settings of :class:`NSE`."""

    neuron_share: PositiveShare
    rounds: Count
    tolerance: NotNegative
    most_missed: NotNegative


def chosen_neurons(keys: Tensor, share: float) -> Tensor:
    """Neurons that hold a share of some key's absolute sum, the fewest of each.

    Args:
        keys: Shape ``[d_in, n]``.
        share: The share; with 1 all neurons are chosen.

    Returns:
        A mask. Shape ``[d_in]``.
    """
    if share >= 1:
        return torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    sizes, order = keys.abs().sort(dim=0, descending=True)
    before = sizes.cumsum(0) - sizes
    needed = before < share * sizes.sum(0)
    return torch.zeros_like(needed).scatter(0, order, needed).any(1)


class NSE(ClosedForm):
    """MEMIT for sequences: values of the original weights, chosen neurons, several rounds.

    Values are optimised without the edits on the stack, so that they do not grow from edit to edit.
    Only the inputs of a projection change that hold most of some key. Facts that miss their value
    after a round are solved for again, unless they miss all of it; the others keep theirs. Bounds
    are relative to what had to be changed, where the paper has norms of its models. Keys of earlier
    edits are kept (``history``). Paper: https://arxiv.org/abs/2410.04045.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks whose MLPs are edited.
        neuron_share: Share of a key's absolute sum that its chosen neurons hold; the paper has
            0.8 for GPT-J, and 1, which is all of them, for GPT-2 XL and Llama 3.
        rounds: Rounds at most.
        tolerance: A fact that misses no more than this share of its change is written.
        most_missed: One that misses more than this share is given up.
        **settings: Those of all closed-form methods.
    """

    settings_type = NSESettings
    settings: NSESettings
    published = "MEMIT"
    keeps_history: ClassVar[bool] = True

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        neuron_share: float = 1.0,
        rounds: int = 3,
        tolerance: float = 0.1,
        most_missed: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, **settings)

    def layer_values(self, requests: Sequence[EditRequest]) -> LastLayerValues:
        """Values at the edited layers, found without the edits on the stack."""
        values = super().layer_values(requests)
        with self.base.edits.suspended():
            for layer in self.layers:
                values.values(layer)
        return values

    def walk(self, batch: EditGroups, values: LastLayerValues) -> None:
        """Solve for all layers, and again for the facts that miss their values."""
        settings, last = self.settings, self.layers[-1]
        first = values.residuals(last).norm(dim=1)
        super().walk(batch, values)
        for _ in range(settings.rounds - 1):
            with batch.in_force() as carried:
                missed = values.residuals(last, carried).norm(dim=1) / first.clamp(min=1e-30)
            open_ = (missed > settings.tolerance) & (missed <= settings.most_missed)
            if not bool(open_.any()):
                break
            values.counting = open_
            super().walk(batch, values)
            values.counting = None

    def update(
        self, module: str, states: SubjectStates, residuals: Tensor, prior: least_squares.Prior
    ) -> LowRankDelta:
        """The change of chosen neurons that maps keys to values."""
        chosen = chosen_neurons(self.mean_keys(states.inputs[module]).T, self.settings.neuron_share)
        if not bool(chosen.all()):
            prior = least_squares.neuron_prior(prior, chosen)
        return super().update(module, states, residuals, prior)
