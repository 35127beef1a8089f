"""The base of methods that step an optimizer by hand, on losses that all ranks share."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.training.learned import LearnedMethod
from kedit_lightning.requests import EditBatch


class BatchOutcome(Protocol):
    """What a step needs to know of a batch, over the episodes of all ranks."""

    @property
    def episodes(self) -> int:
        """Number of episodes that gave a finite gradient; nothing else is defined for 0."""

    @property
    def skipped(self) -> int:
        """Number of episodes left out, because their gradient was not finite."""

    @property
    def loss(self) -> Tensor:
        """The loss, a mean."""

    @property
    def mean_gradients(self) -> list[Tensor]:
        """Its gradient, one tensor a parameter."""

    @property
    def scalars(self) -> Mapping[str, Tensor]:
        """What is worth logging beside the loss."""


AnyOutcome = TypeVar("AnyOutcome", bound=BatchOutcome)


class SteppedMethod(LearnedMethod, Generic[AnyOutcome]):
    """One training step, with clipping, schedule and logs.

    The gradient is summed over the ranks here and not by the wrapper for several processes, so that
    a mean over all ranks is one of equal parts also where some episodes are left out.

    A subclass says with :meth:`learn` what a batch costs, and has the settings ``clip``, ``lr_end``
    and one learning rate for each of its networks'
    :meth:`~kedit_lightning.methods.training.learned.LearnedNetwork.parameter_groups`.

    Args:
        base_model: The model to edit.
        seed: Start of all random choices.
    """

    def __init__(self, base_model: BaseModel | BaseModelSpec | str = "nano", seed: int = 0) -> None:
        super().__init__(base_model, seed)
        self.automatic_optimization = False

    @abstractmethod
    def learn(self, batch: EditBatch) -> AnyOutcome:
        """Losses and gradient of a batch, over the episodes of all ranks.

        Takes the batch into running statistics, and changes nothing else.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define learn")

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

    def outcomes(self, batch: EditBatch) -> Iterator[AnyOutcome]:
        """What the optimizer steps on, one after the other; a method may take a batch in parts."""
        yield self.learn(batch)

    def training_step(self, batch: EditBatch, batch_idx: int) -> Tensor | None:
        """Try the edits of a batch, and step the networks on what they cost.

        Episodes whose gradient is not finite are left out, counted and reported.
        """
        loss = None
        for outcome in self.outcomes(batch):
            self.network.skipped += outcome.skipped
            scalars = {"train/skipped_episodes": self.network.skipped.float()}
            if outcome.episodes:
                loss = outcome.loss
                scalars |= self.step(outcome)
                self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
            self.log_dict(scalars, batch_size=len(batch))
        return loss

    def step(self, outcome: AnyOutcome) -> dict[str, Tensor]:
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
            "train/gradient_norm": norm,
            **{f"train/{name}": value for name, value in outcome.scalars.items()},
            **{f"train/{name}": value for name, value in self.network.scalars().items()},
        }

    def _lower_learning_rates(self, groups: list[dict[str, Any]]) -> None:
        """Set the learning rates of the present step.

        From the number of the step or batch alone, so that a resumed fit needs no further state.
        (Asking the trainer for the length before the fit would keep its loader from being resumed.)
        """
        end, trainer = self.hparams["lr_end"], self.trainer
        if end == 1.0:
            return
        done: float = trainer.global_step
        whole: float = trainer.max_steps
        if whole < 0:
            batches = trainer.num_training_batches
            done = trainer.current_epoch * batches + trainer.fit_loop.epoch_loop.batch_idx
            whole = (trainer.max_epochs or -1) * batches
        left = 1 - (1 - end) * min(1.0, done / whole)
        for group, name in zip(groups, self.network.parameter_groups(), strict=True):
            group["lr"] = left * self.hparams[name]
