"""KE: a network that reads a request and gates its gradient, within a bound on other answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.hypernetwork.ke.knowledge_editor import (
    CONDITION,
    HIDDEN,
    EditorPlan,
    KnowledgeEditor,
)
from kedit_lightning.methods.hypernetwork.shared.outcome import Outcome
from kedit_lightning.methods.hypernetwork.shared.proposing import ProposingMethod


class KE(ProposingMethod):
    """KnowledgeEditor, from "Editing Factual Knowledge in Language Models" (De Cao et al. 2021).

    ``fit`` trains a network that reads ``old answer >> new answer || prompt`` and gates the
    gradient of the request with rank-one matrices. It asks for the new answer to the prompt and to
    other wordings (rephrases), while answers to unrelated questions (locality probes) may diverge
    by a margin only: a Lagrange multiplier grows while they diverge by more, and the margin shrinks
    after each validation whose edits succeed. An edit then costs one forward and one backward pass.

    Differences from the released code: the gradient stays in thin factors, which is exact and costs
    what MEND costs; word embeddings are read from the base model and stay as they are, where the
    released code trains them in place and so changes the base model; the multiplier takes plain
    steps of dual ascent after each step of the networks, over the episodes of all ranks; the
    networks take steps of Adam, whose first ones are no larger than later ones, where the released
    code has a centred RMSprop with a warm-up; the projections of the last blocks are edited unless
    settings ask for others, where the released code edits every matrix; several requests give the
    sum of their edits; the old answer is the request's own where it has one, and else what the base
    model says, which is what the released code takes.

    The margin changes at validations alone: without validation data it stays as it is. Divergence
    of answers is what is bounded; the paper's alternative, a bound on the p-norm of the change, is
    not offered.

    Args:
        base_model: The model to edit.
        layers: Blocks whose MLP projections are edited; negative numbers count from the end. The
            checkpoint's, or else the last three.
        modules: Names of the projections to edit instead of those of ``layers``.
        hidden: Width of the LSTM in each direction and of the conditioners' inner layers. The
            checkpoint's, or else 128.
        condition: Width of what a request is turned into. The checkpoint's, or else 1024.
        max_scale: Largest strength of an edit. The checkpoint's, or else 1.
        lr: Learning rate of the networks.
        lr_end: Share of the learning rate that is left at the end of a fit, reached in a straight
            line; it needs a fit of known length.
        lr_multiplier: Learning rate of the multiplier.
        margin: Divergence on locality probes that is allowed to begin with.
        margin_floor: Margin below which validations do not bring it.
        n_edits: Examples edited together in one episode.
        accumulate: Episodes a training step.
        at_once: Episodes of a step that run through the model together; all of them if absent.
            Fewer take less memory and give the same step.
        n_rephrases: Rephrases asked an example and episode; the next ones in each epoch.
        own_wording: Ask the request's own prompt in each episode, beside the rephrases.
        vary_targets: Write another answer in each epoch, one that some record gives instead of the
            same old answer. It makes more of few records; they need ``target_old``.
        n_locality: Locality probes asked an example and episode; the next ones in each epoch.
        clip: Largest norm of the gradient of a training step.
        checkpoint: What to start from: a file that ``fit`` wrote, or ``none`` for untrained
            networks.
        seed: Start of all random choices.
    """

    learns: ClassVar[str] = "a network that gates the gradients of requests"
    plan_type = EditorPlan
    settles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "modules": ("layers", "modules"),
        "hidden": ("hidden",),
        "condition": ("condition",),
        "max_scale": ("max_scale",),
    }

    network: KnowledgeEditor

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        modules: list[str] | None = None,
        hidden: int | None = None,
        condition: int | None = None,
        max_scale: float | None = None,
        lr: float = 3e-4,
        lr_end: float = 1.0,
        lr_multiplier: float = 0.1,
        margin: float = 1e-3,
        margin_floor: float = 1e-5,
        n_edits: int = 1,
        accumulate: int = 10,
        at_once: int | None = None,
        n_rephrases: int = 1,
        own_wording: bool = True,
        vary_targets: bool = False,
        n_locality: int = 1,
        clip: float = 100.0,
        checkpoint: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(base_model, seed)
        self.fit_batch_size = n_edits * accumulate

    # ---- building

    def plan(self) -> EditorPlan:
        """The networks that the settings ask for."""
        settings = self.hparams
        return EditorPlan(
            modules=self.edited_modules(),
            hidden=HIDDEN if settings["hidden"] is None else settings["hidden"],
            condition=CONDITION if settings["condition"] is None else settings["condition"],
            max_scale=1.0 if settings["max_scale"] is None else settings["max_scale"],
        )

    def create(self, plan: EditorPlan) -> KnowledgeEditor:
        """Untrained networks.

        Raises:
            UnsupportedUseError: A projection cannot be edited.
        """
        settings = self.hparams
        return KnowledgeEditor(
            plan,
            self.shapes_of(plan.modules),
            self.base.model.get_input_embeddings().weight.shape[1],
            settings["margin"],
            compute_dtype(self.base.dtype),
            settings["seed"],
        )

    # ---- fitting

    @property
    def loss_weights(self) -> tuple[float, float]:
        """The divergence counts as much as the multiplier says."""
        return 1.0, float(self.network.bound.multiplier)

    def step(self, outcome: Outcome) -> dict[str, Tensor]:
        """Step the networks down the loss, then the multiplier up; returns what is logged."""
        scalars = super().step(outcome)
        self.network.bound.ascend(outcome.locality, self.hparams["lr_multiplier"])
        return scalars

    def on_validation_epoch_end(self) -> None:
        """Make the margin smaller when the edits of a validation during ``fit`` succeed."""
        super().on_validation_epoch_end()
        if not self._fitting or self.trainer.sanity_checking:
            return
        for row in self.summary:
            if row.key == "rewrite/tf_all":
                self.network.bound.tighten(row.mean, self.hparams["margin_floor"])
