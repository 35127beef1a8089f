"""MEND: a network that turns the gradient of a request into an edit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import Edit, LowRankEdit
from kedit_lightning.edits.modules import check_editable, compute_dtype, projection_shape
from kedit_lightning.errors import BaseModelMismatchError, UnsupportedUseError
from kedit_lightning.methods.base import Capabilities, EditMethod, Need
from kedit_lightning.methods.capture import capture_factors
from kedit_lightning.methods.hypernetwork.checkpoints import packaged_checkpoint, read_checkpoint
from kedit_lightning.methods.hypernetwork.episodes import (
    Episode,
    alternatives,
    make_episodes,
    probes_of,
    with_another_target,
)
from kedit_lightning.methods.hypernetwork.learning import Outcome, learn
from kedit_lightning.methods.hypernetwork.transform import MAX_RANK, Hypernetwork, Plan
from kedit_lightning.requests import EditBatch, EditExample, EditRequest

#: Blocks at the end of a model that are edited unless a setting says otherwise.
_LAST_BLOCKS = 3


class MEND(EditMethod):
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
            checkpoint's, or else the last three.
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

    needs_to_fit: ClassVar[frozenset[Need]] = frozenset({"rephrases", "locality"})
    can: ClassVar[Capabilities] = Capabilities(adapter=True, weights=True)
    learns: ClassVar[str] = "a hypernetwork that turns gradients into edits"

    hypernetwork: Hypernetwork | None

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
        self.automatic_optimization = False
        self.fit_batch_size = n_edits * accumulate
        self.hypernetwork = None
        self._learned_from = "nothing"
        self._alternatives: dict[str, list[str]] = {}

    # ---- building

    def build(self) -> None:
        """Create the networks, from a checkpoint where one is named or comes with the base model.

        Raises:
            UnsupportedUseError: A projection cannot be edited.
            BaseModelMismatchError: The named checkpoint was made for other projections.
        """
        start = self.hparams["checkpoint"]
        if start is None and not self._fitting:
            checkpoint = packaged_checkpoint("mend.ckpt", self.base)
            if checkpoint is not None and not self._disagreements(checkpoint):
                self._adopt(checkpoint, "the checkpoint packaged with the base model")
                return
        elif start not in (None, "none"):
            checkpoint = read_checkpoint(start)
            if wrong := self._disagreements(checkpoint):
                raise UnsupportedUseError(
                    f"checkpoint '{start}' was fitted with {'; '.join(wrong)}; leave these "
                    "settings out, or fit again"
                )
            self._adopt(checkpoint, str(start))
            return
        self._create(self._plan())

    def _plan(self) -> Plan:
        """The networks that the settings ask for."""
        settings = self.hparams
        modules = settings["modules"]
        if modules is None:
            layers = settings["layers"]
            if layers is None:
                layers = range(max(0, len(self.base.layout) - _LAST_BLOCKS), len(self.base.layout))
            modules = [name for i in layers for name in self.base.layout.block(i).projections]
        return Plan(
            modules=tuple(dict.fromkeys(modules)),
            rank=MAX_RANK if settings["rank"] is None else settings["rank"],
            blocks=settings["blocks"],
            shared=True if settings["shared"] is None else settings["shared"],
            normalise=settings["normalise"],
            ascend=settings["legacy_sign"],
        )

    def _disagreements(self, checkpoint: dict[str, Any]) -> list[str]:
        """Settings that were given and that a checkpoint was not fitted with."""
        made, own = Plan.from_json(checkpoint["hypernetwork"]).to_json(), self._plan().to_json()
        free = {name for name in ("rank", "shared") if self.hparams[name] is None}
        if self.hparams["layers"] is None and self.hparams["modules"] is None:
            free |= {"modules"}
        return [
            f"{k} {made[k]!r}, not {own[k]!r}" for k in own if k not in free and made[k] != own[k]
        ]

    def _create(self, plan: Plan) -> None:
        model = self.base.model
        shapes = [projection_shape(check_editable(model, name)) for name in plan.modules]
        dtype = compute_dtype(self.base.dtype)
        settings = self.hparams
        network = Hypernetwork(plan, shapes, settings["edit_lr"], dtype, settings["seed"])
        self.hypernetwork = network.to(self.base.device)

    def _adopt(self, checkpoint: dict[str, Any], source: str) -> None:
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])
        self._learned_from = source

    @property
    def _network(self) -> Hypernetwork:
        assert self.hypernetwork is not None, "configure_model comes first"
        return self.hypernetwork

    # ---- editing

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One gradient of the requests, sent through the networks. Statistics stay as they are."""
        network = self._network.to(self.base.device)
        self._warn_if_untrained(network)
        rows = self.base.rows([r.prompt for r in requests], [r.target_new for r in requests])
        factors = capture_factors(self.base, rows, network.plan.modules)
        with torch.no_grad():
            changes = network(factors, torch.zeros(len(requests), dtype=torch.long))
        notes = {"learned_from": self._learned_from, "updates": int(network.updates)}
        return LowRankEdit(
            self.base,
            {name: (change.a, change.b.T) for name, change in changes.items()},
            self.origin(requests, **notes),
        )

    def _warn_if_untrained(self, network: Hypernetwork) -> None:
        if int(network.updates) or self._fitting or self.hparams["checkpoint"] == "none":
            return
        warnings.warn(
            f"MEND has not been fitted on base model '{self.base.name}' with these settings, and "
            "untrained networks edit poorly; run `kedit fit -c methods/mend` with your data and "
            "name the file it writes in `checkpoint`, or set `checkpoint` to none to use them as "
            "they are",
            stacklevel=2,
        )

    # ---- fitting

    @property
    def _fitting(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    def check_examples(self, examples: Sequence[EditExample], fitting: bool = False) -> None:
        """Make sure that each example has rephrases, and that some have locality probes.

        Raises:
            MissingNeedsError: Names every example that lacks something, and the field.
        """
        if fitting and probes_of(examples, "locality"):
            examples = [e for e in examples if not probes_of([e], "rephrase")]
        super().check_examples(examples, fitting)

    def on_fit_start(self) -> None:
        """Refuse what this training does not do.

        Raises:
            UnsupportedUseError: The precision is ``16-mixed``, whose losses must be scaled, or the
                learning rates are to fall in a fit of unknown length.
        """
        endless = self.trainer.max_steps < 0 and (self.trainer.max_epochs or -1) < 0
        if self.hparams["lr_end"] != 1.0 and endless:
            raise UnsupportedUseError(
                "lr_end needs a fit of known length; set trainer.max_epochs or trainer.max_steps"
            )
        if self.trainer.precision == "16-mixed":
            raise UnsupportedUseError(
                "MEND does not scale losses, which precision 16-mixed needs; set trainer.precision "
                "to bf16-mixed or 32-true"
            )
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.hparams["vary_targets"] and datamodule is not None:
            self._alternatives = alternatives(datamodule.examples("train"))
        # It advises to save weights from before the step, which a resumed fit must not start from.
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam, with a learning rate for the networks and one for the edits' learning rates."""
        network = self._network
        return torch.optim.Adam(
            [
                {"params": list(network.networks.parameters()), "lr": self.hparams["lr"]},
                {"params": [network.rates], "lr": self.hparams["lr_lr"]},
            ]
        )

    def _lower_learning_rates(self, groups: list[dict[str, Any]]) -> None:
        """Set the learning rates of the present step.

        From the step's number alone, so that a resumed fit needs no further state.  (Asking the
        trainer for the length before the fit would keep its loader from being resumed.)
        """
        end = self.hparams["lr_end"]
        if end == 1.0:
            return
        steps: float = self.trainer.max_steps
        if steps < 0:
            steps = (self.trainer.max_epochs or -1) * self.trainer.num_training_batches
        left = 1 - (1 - end) * min(1.0, self.trainer.global_step / steps)
        for group, name in zip(groups, ("lr", "lr_lr"), strict=True):
            group["lr"] = left * self.hparams[name]

    def episodes(self, batch: EditBatch) -> list[Episode]:
        """The episodes of a batch: ``n_edits`` examples each."""
        settings = self.hparams
        turn = self.current_epoch if self._trainer is not None else 0
        examples, seed = batch.examples, settings["seed"]
        if self._alternatives:
            examples = [with_another_target(e, self._alternatives, turn, seed) for e in examples]
        return make_episodes(
            examples,
            settings["n_edits"],
            turn,
            seed,
            settings["n_rephrases"],
            settings["n_locality"],
            settings["own_wording"],
        )

    def learn(self, batch: EditBatch) -> Outcome:
        """Losses and gradient of a batch, over the episodes of all ranks.

        Takes the batch into the statistics of the normalisers, and changes nothing else.
        """
        settings = self.hparams
        return learn(
            self.base,
            self._network,
            self.episodes(batch),
            (settings["c_edit"], settings["c_loc"]),
            settings["at_once"],
        )

    def training_step(self, batch: EditBatch, batch_idx: int) -> Tensor | None:
        """Try one edit for each episode of the batch, and step the networks on what it cost.

        Episodes whose gradient is not finite are left out, counted and reported.
        """
        outcome = self.learn(batch)
        network = self._network
        network.skipped += outcome.skipped
        scalars = {"train/skipped_episodes": network.skipped.float()}
        if outcome.episodes:
            scalars |= self._step(outcome)
        self.log_dict(scalars, batch_size=len(batch))
        if not outcome.episodes:
            return None
        self.log("train/loss", outcome.loss, prog_bar=True, batch_size=len(batch))
        return outcome.loss

    def _step(self, outcome: Outcome) -> dict[str, Tensor]:
        network = self._network
        parameters = list(network.parameters())
        for parameter, gradient in zip(parameters, outcome.mean_gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.hparams["clip"])
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        self._lower_learning_rates(optimizer.param_groups)
        optimizer.step()
        optimizer.zero_grad()
        network.updates += 1
        rates = dict(zip(network.plan.modules, network.rates.detach(), strict=True))
        return {
            "train/loss_edit": outcome.edit,
            "train/loss_locality": outcome.locality,
            "train/edit_success": outcome.right,
            "train/gradient_norm": norm,
            **{f"train/edit_lr/{name}": rate for name, rate in rates.items()},
        }

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the plan of the networks."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hypernetwork"] = self._network.plan.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the networks the shape that the checkpoint's have.

        Raises:
            BaseModelMismatchError: The base model lacks the checkpoint's projections.
        """
        super().on_load_checkpoint(checkpoint)
        plan = Plan.from_json(checkpoint["hypernetwork"])
        if self.hypernetwork is None or self.hypernetwork.plan != plan:
            self._create(plan)
        self._learned_from = "a checkpoint"
        wanted = self._network.state_dict()
        for name, tensor in wanted.items():
            found = checkpoint["state_dict"].get(f"hypernetwork.{name}")
            if found is None or found.shape != tensor.shape:
                made = checkpoint["base_model"]["name"]
                raise BaseModelMismatchError(
                    f"the checkpoint was fitted on base model '{made}', whose projections have "
                    f"other shapes than those of '{self.base.name}' ('{name}' does not fit); fit "
                    "again"
                )
