"""MALMEN: a hypernetwork that edits thousands of facts together, by one ridge regression."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.methods.hypernetwork.shared.hypernetwork_method import (
    HypernetworkMethod,
    HypernetworkSettings,
)
from kedit_lightning.methods.hypernetwork.shared.malmen_method import MALMENMethod
from kedit_lightning.methods.hypernetwork.shared.meta_gradient import MetaGradient
from kedit_lightning.methods.hypernetwork.shared.parameter_shift import training_shifts
from kedit_lightning.methods.hypernetwork.shared.shift_gradient import (
    WeightedEpisodes,
    shift_gradient,
)
from kedit_lightning.methods.hypernetwork.shared.value_networks import (
    MALMENMethodSettings,
    ValuePlan,
)
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.requests import EditBatch


@dataclass(frozen=True)
class MALMENSettings(MALMENMethodSettings, HypernetworkSettings):
    """Settings of :class:`MALMEN`."""


class MALMEN(MALMENMethod, HypernetworkMethod):
    """MALMEN, from "Massive Editing for Large Language Models via Meta Learning" (Tan et al. 2024).

    ``fit`` trains small networks that map the gradient at each token of a request to a value
    difference: how the output of an edited projection is to change there. One ridge regression for
    each projection aggregates the value differences of all requests, so that edits do not cancel
    each other as sums of separate edits do. Requests run in minibatches, and the memory of a device
    does not grow with their number.

    Differences from the released code: rates and ridges are learned as logarithms, in a group of
    their own; the loss is the mean over examples, whatever the minibatches; statistics do not
    change while edits are computed; several processes write the requests of all of them together.

    By default the last six blocks are edited.

    Args:
        base_model: The model to edit.
        n_edits: Examples that one edit writes in training.
        at_once: Most examples that run through the model together, in training and in editing.
        **settings: The settings of :class:`HypernetworkMethod`.
    """

    last_blocks: ClassVar[int] = 6
    default_projections = "down"
    plan_type = ValuePlan
    settings_type: ClassVar[type[MethodSettings]] = MALMENSettings

    settings: MALMENSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        n_edits: int = 512,
        at_once: int = 32,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, n_edits=n_edits, at_once=at_once, **settings)

    def batch_gradients(self, batch: EditBatch) -> Iterator[MetaGradient]:
        """The meta-gradient of a batch whose requests one edit writes, over all ranks."""
        base, network, settings = self.base, self.network, self.settings
        episodes = self.draw_episodes(self.examples_of(batch), 1)
        parts, shifts = training_shifts(base, network, episodes, settings.at_once)
        weights, groups = (settings.c_edit, settings.c_loc, 0.0), [WeightedEpisodes(episodes)]
        yield shift_gradient(base, network, parts, shifts, groups, weights, settings.at_once)
