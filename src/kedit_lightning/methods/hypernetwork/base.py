"""The base of hypernetworks: one training step, with clipping, schedule and logs."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import Edit, LowRankEdit
from kedit_lightning.edits.modules import check_editable, projection_shape
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.base import Capabilities, Need
from kedit_lightning.methods.capture import capture_factors
from kedit_lightning.methods.episodes import Episode, make_episodes, probes_of
from kedit_lightning.methods.hypernetwork.learning import learn
from kedit_lightning.methods.hypernetwork.network import ProposingNetwork
from kedit_lightning.methods.hypernetwork.outcome import Outcome
from kedit_lightning.methods.learned import LearnedMethod
from kedit_lightning.requests import EditBatch, EditExample, EditRequest


class HypernetworkMethod(LearnedMethod):
    """Steps networks on what edits cost that they have made.

    An edit is what the networks propose for one gradient of the requests.  A subclass says with
    :attr:`loss_weights` what an edit costs, or with :meth:`learn` what a batch costs.  It has the
    settings ``layers``, ``modules``, ``clip``, ``lr_end``, those of :meth:`episodes`, ``at_once``,
    and one learning rate for each of its networks'
    :meth:`~kedit_lightning.methods.learned.LearnedNetwork.parameter_groups`.

    Args:
        base_model: The model to edit.
        seed: Start of all random choices.
    """

    can: ClassVar[Capabilities] = Capabilities(adapter=True, weights=True)
    needs_to_fit: ClassVar[frozenset[Need]] = frozenset({"rephrases", "locality"})
    learns: ClassVar[str] = "a hypernetwork that turns gradients into edits"
    #: Blocks at the end of a model that are edited unless a setting says otherwise.
    last_blocks: ClassVar[int] = 3

    network: ProposingNetwork

    def __init__(self, base_model: BaseModel | BaseModelSpec | str = "nano", seed: int = 0) -> None:
        super().__init__(base_model, seed)
        self.automatic_optimization = False

    # ---- what a method defines

    @property
    @abstractmethod
    def loss_weights(self) -> tuple[float, float]:
        """Weights of the loss of the new answers and of the divergence on locality probes."""
        raise NotImplementedError(f"{type(self).__name__} does not define loss_weights")

    # ---- building

    def edited_modules(self) -> tuple[str, ...]:
        """Names of the projections that the settings ask to edit."""
        modules: Iterable[str] | None = self.hparams["modules"]
        if modules is None:
            layout = self.base.layout
            layers = self.hparams["layers"]
            if layers is None:
                layers = range(max(0, len(layout) - self.last_blocks), len(layout))
            modules = (name for i in layers for name in layout.block(i).projections)
        return tuple(dict.fromkeys(modules))

    def shapes_of(self, modules: Sequence[str]) -> list[tuple[int, int]]:
        """``(d_in, d_out)`` of projections.

        Raises:
            UnsupportedUseError: A projection cannot be edited.
        """
        return [projection_shape(check_editable(self.base.model, name)) for name in modules]

    # ---- editing

    def worded(
        self, requests: Sequence[EditRequest], fitting: bool = False
    ) -> tuple[EditRequest, ...]:
        """Requests in the words whose gradient is taken: their own, unless a method adds some.

        Args:
            requests: The requests.
            fitting: Whether they belong to an episode of ``fit``, and not to an edit.
        """
        return tuple(requests)

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One gradient of the requests, sent through the networks. Statistics stay as they are."""
        network = self.network.to(self.base.device)
        self.warn_if_untrained()
        read = self.worded(requests)
        rows = self.base.rows([r.prompt for r in read], [r.target_new for r in read])
        factors = capture_factors(self.base, rows, network.plan.modules)
        together = torch.zeros(len(read), dtype=torch.long)
        with torch.no_grad():
            changes = network.propose(self.base, read, factors, together)
        return LowRankEdit(
            self.base,
            {name: (change.a, change.b.T) for name, change in changes.items()},
            self.origin(requests, **self.learned),
        )

    # ---- fitting

    def episodes(self, batch: EditBatch) -> list[Episode]:
        """The episodes of a batch: ``n_edits`` examples each."""
        settings = self.hparams
        episodes = make_episodes(
            self.examples_of(batch),
            settings["n_edits"],
            self.turn,
            settings["seed"],
            settings["n_rephrases"],
            settings["n_locality"],
            settings["own_wording"],
        )
        return [replace(e, requests=self.worded(e.requests, fitting=True)) for e in episodes]

    def learn(self, batch: EditBatch) -> Outcome:
        """Losses and gradient of a batch, over the episodes of all ranks.

        Takes the batch into the statistics of the normalisers, and changes nothing else.
        """
        episodes, at_once = self.episodes(batch), self.hparams["at_once"]
        return learn(self.base, self.network, episodes, self.loss_weights, at_once)

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
        super().on_fit_start()
        endless = self.trainer.max_steps < 0 and (self.trainer.max_epochs or -1) < 0
        if self.hparams["lr_end"] != 1.0 and endless:
            raise UnsupportedUseError(
                "lr_end needs a fit of known length; set trainer.max_epochs or trainer.max_steps"
            )
        if self.trainer.precision == "16-mixed":
            raise UnsupportedUseError(
                f"{type(self).__name__} does not scale losses, which precision 16-mixed needs; set "
                "trainer.precision to bf16-mixed or 32-true"
            )
        # It advises to save weights from before the step, which a resumed fit must not start from.
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam, with a learning rate for each group of parameters."""
        groups = self.network.parameter_groups().items()
        return torch.optim.Adam(
            [{"params": parameters, "lr": self.hparams[name]} for name, parameters in groups]
        )

    def training_step(self, batch: EditBatch, batch_idx: int) -> Tensor | None:
        """Try the edits of a batch, and step the networks on what they cost.

        Episodes whose gradient is not finite are left out, counted and reported.
        """
        outcome = self.learn(batch)
        self.network.skipped += outcome.skipped
        scalars = {"train/skipped_episodes": self.network.skipped.float()}
        if outcome.episodes:
            scalars |= self.step(outcome)
        self.log_dict(scalars, batch_size=len(batch))
        if not outcome.episodes:
            return None
        self.log("train/loss", outcome.loss, prog_bar=True, batch_size=len(batch))
        return outcome.loss

    def step(self, outcome: Outcome) -> dict[str, Tensor]:
        """Step the optimizer with the mean gradient; returns what is logged."""
        parameters = list(self.network.parameters())
        for parameter, gradient in zip(parameters, outcome.mean_gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.hparams["clip"])
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        self._lower_learning_rates(optimizer.param_groups)
        optimizer.step()
        optimizer.zero_grad()
        self.network.updates += 1
        return {
            "train/loss_edit": outcome.edit,
            "train/loss_locality": outcome.locality,
            "train/edit_success": outcome.right,
            "train/gradient_norm": norm,
            **{f"train/{name}": value for name, value in self.network.scalars().items()},
        }

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
        for group, name in zip(groups, self.network.parameter_groups(), strict=True):
            group["lr"] = left * self.hparams[name]
