"""MEND: a network that turns the gradient of a request into an edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.hypernetwork.shared.gradient_transform import (
    MAX_RANK,
    Hypernetwork,
    TransformPlan,
)
from kedit_lightning.methods.hypernetwork.shared.proposing import ProposingMethod
from kedit_lightning.methods.method import Capabilities


class MEND(ProposingMethod):
    """MEND, from "Fast Model Editing at Scale" (Mitchell et al. 2022).

    ``fit`` trains small networks that map the gradient of a request, taken apart into the inputs
    and the output gradients of each edited projection, to the factors of an edit. The loss asks
    for the new answer to other wordings (rephrases) and for unchanged answers to unrelated
    questions (locality probes). An edit then costs one forward and one backward pass.

    Differences from the released code: the edit descends (a positive learning rate lowers the
    loss); the two learning rates belong to two groups of one Adam, where the released code steps
    the edits' learning rates with both of its optimizers; a step takes ``accumulate`` episodes in
    one pass, each row of the batch carrying its own edit, which gives the same gradient; the loss
    of several requests is the sum over requests of the mean over answer tokens.

    Args:
        base_model: The model to edit.
        layers: Blocks whose MLP projections are edited; negative numbers count from the end. The
            checkpoint's, or else the last three; of an encoder-decoder, the last two of each half.
        modules: Names of the projections to edit instead of those of ``layers``.
        rank: Largest rank of a network's matrices. The checkpoint's, or else 1920.
        blocks: Residual blocks of a network.
        shared: One network for all projections of a shape, rather than one for each projection.
            The checkpoint's, or else true.
        normalise: Normalise the factors with running statistics. Without it, untrained networks
            give a plain step of gradient descent.
        lr: Learning rate of the networks.
        lr_lr: Learning rate of the edits' own learning rates.
        lr_end: Share of both learning rates that is left at the end of a fit, reached in a
            straight line; it needs a fit of known length.
        edit_lr: Start of the edits' learning rates.
        c_edit: Weight of the loss of the new answers.
        c_loc: Weight of the divergence on locality probes.
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
            networks. If absent, a checkpoint that comes with the base model is used to edit, where
            there is one that fits the other settings.
        legacy_sign: Add the pseudo-gradient as the released code does, so that a positive learning
            rate raises the loss until training has turned its sign.
        seed: Start of all random choices.
    """

    can: ClassVar[Capabilities] = Capabilities(encoder_decoder=True, adapter=True, weights=True)
    plan_type = TransformPlan
    packaged: ClassVar[str] = "mend.ckpt"
    settles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "modules": ("layers", "modules"),
        "rank": ("rank",),
        "shared": ("shared",),
    }

    network: Hypernetwork

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        modules: list[str] | None = None,
        rank: int | None = None,
        blocks: int = 2,
        shared: bool | None = None,
        normalise: bool = True,
        lr: float = 1e-6,
        lr_lr: float = 1e-4,
        lr_end: float = 1.0,
        edit_lr: float = 1e-4,
        c_edit: float = 0.1,
        c_loc: float = 1.0,
        n_edits: int = 1,
        accumulate: int = 10,
        at_once: int | None = None,
        n_rephrases: int = 1,
        own_wording: bool = False,
        vary_targets: bool = False,
        n_locality: int = 1,
        clip: float = 100.0,
        checkpoint: str | None = None,
        legacy_sign: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base_model, seed)
        self.fit_batch_size = n_edits * accumulate

    # ---- building

    def plan(self) -> TransformPlan:
        """The networks that the settings ask for."""
        settings = self.hparams
        return TransformPlan(
            modules=self.edited_modules(),
            rank=MAX_RANK if settings["rank"] is None else settings["rank"],
            blocks=settings["blocks"],
            shared=True if settings["shared"] is None else settings["shared"],
            normalise=settings["normalise"],
            ascend=settings["legacy_sign"],
        )

    def create(self, plan: TransformPlan) -> Hypernetwork:
        """Untrained networks.

        Raises:
            UnsupportedUseError: A projection cannot be edited.
        """
        shapes, settings = self.shapes_of(plan.modules), self.hparams
        dtype = compute_dtype(self.base.dtype)
        return Hypernetwork(plan, shapes, settings["edit_lr"], dtype, settings["seed"])

    # ---- fitting

    @property
    def loss_weights(self) -> tuple[float, float]:
        """Those that the settings give."""
        return self.hparams["c_edit"], self.hparams["c_loc"]
