"""KE: a hypernetwork that gates the gradient of a request, constrained by divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.capabilities import Count, NotNegative, Positive
from kedit_lightning.methods.hypernetwork.ke.knowledge_editor import EditorPlan, KnowledgeEditor
from kedit_lightning.methods.hypernetwork.shared.hypernetwork_method import (
    HypernetworkMethod,
    HypernetworkSettings,
)
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.methods.training.trained_network import BatchGradient


@dataclass(frozen=True)
class KESettings(HypernetworkSettings):
    """Settings of :class:`KE`."""

    hidden: Count | None
    condition: Count | None
    max_scale: Positive | None
    lr_multiplier: NotNegative
    margin: NotNegative
    margin_floor: NotNegative
    accumulate: Count


class KE(HypernetworkMethod):
    """KnowledgeEditor, from "Editing Factual Knowledge in Language Models" (De Cao et al. 2021).

    ``fit`` trains a network that reads ``old answer >> new answer || prompt`` and gates the
    gradient of the request with rank-one matrices. The loss is the likelihood of the new answer to
    the prompt and to rephrases, under a constraint: answers to unrelated questions (locality
    probes) may diverge by a margin only. A Lagrange multiplier grows while they diverge by more,
    and the margin shrinks after each validation whose edits succeed. An edit then costs one forward
    and one backward pass.

    Differences from the released code: the gradient stays in low-rank factors, which is exact and
    costs what MEND costs; word embeddings are read from the base model and stay as they are, where
    the released code trains them in place and so changes the base model; the multiplier takes plain
    steps of dual ascent after each step of the networks, over the episodes of all ranks; the
    networks take steps of Adam, whose first ones are no larger than later ones, where the released
    code has a centred RMSprop with a warm-up; the projections of the last blocks are edited unless
    settings ask for others, where the released code edits every matrix; several requests give the
    sum of their edits; the old answer is the request's own where it has one, and else the base
    model's answer, as in the released code.

    The margin changes at validations alone: without validation data it is constant. The paper's
    alternative constraint, on the p-norm of the update, is not offered.

    By default the MLP projections of the last three blocks are edited.

    Args:
        base_model: The model to edit.
        hidden: Hidden width of the LSTM in each direction, and of the conditioners. The
            checkpoint's, or else 128.
        condition: Width of the condition vector of a request. The checkpoint's, or else 1024.
        max_scale: Largest scale of an edit. The checkpoint's, or else 1.
        lr: Learning rate of the networks.
        lr_multiplier: Learning rate of the multiplier.
        margin: Initial margin: the divergence on locality probes that is allowed.
        margin_floor: Smallest margin that validations bring it down to.
        accumulate: Episodes of a training step.
        own_wording: Add the request's own prompt to the rephrases.
        **settings: The settings of :class:`HypernetworkMethod`.
    """

    learns: ClassVar[str] = "a network that gates the gradients of requests"
    settings_type: ClassVar[type[MethodSettings]] = KESettings
    plan_type = EditorPlan

    settings: KESettings
    network: KnowledgeEditor

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        hidden: int | None = None,
        condition: int | None = None,
        max_scale: float | None = None,
        lr: float = 3e-4,
        lr_multiplier: float = 0.1,
        margin: float = 1e-3,
        margin_floor: float = 1e-5,
        accumulate: int = 10,
        own_wording: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, lr=lr, own_wording=own_wording, **settings)
        self.fit_batch_size *= accumulate

    def create(self, plan: EditorPlan) -> KnowledgeEditor:
        """Untrained networks.

        Raises:
            UnsupportedUseError: A projection cannot be edited.
        """
        shapes, dtype = self.shapes_of(plan.modules), compute_dtype(self.base.dtype)
        width, settings = self.base.model.get_input_embeddings().weight.shape[1], self.settings
        return KnowledgeEditor(plan, shapes, width, settings.margin, dtype, settings.start)

    @property
    def loss_weights(self) -> tuple[float, float]:
        """Weights of the edit loss and of the locality loss, the multiplier."""
        return 1.0, float(self.network.bound.multiplier)

    def update_networks(self, gradient: BatchGradient) -> dict[str, Tensor]:
        """Step the networks down the loss, then the multiplier up; returns the scalars to log."""
        scalars = super().update_networks(gradient)
        self.network.bound.ascend(gradient.scalars["loss_locality"], self.settings.lr_multiplier)
        return scalars

    def on_validation_epoch_end(self) -> None:
        """Shrink the margin when the edits of a validation during ``fit`` succeed."""
        super().on_validation_epoch_end()
        if not self._fitting or self.trainer.sanity_checking:
            return
        for row in self.summary:
            if row.key == "rewrite/tf_all":
                self.network.bound.tighten(row.mean, self.settings.margin_floor)
