"""The base of methods whose ``fit`` trains networks that later edits share."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.edits import EditOrigin
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import Positive, Share
from kedit_lightning.methods.method import EditMethod, MethodSettings
from kedit_lightning.methods.training.checkpoint import (
    check_fitted_with,
    check_shapes,
    packaged_checkpoint,
    read_checkpoint,
)
from kedit_lightning.methods.training.episodes import alternatives, with_another_target
from kedit_lightning.methods.training.trained_network import BatchGradient, Plan, TrainedNetwork
from kedit_lightning.requests import EditBatch, EditExample, EditRequest


@dataclass(frozen=True)
class TrainedSettings(MethodSettings):
    """Settings of :class:`TrainedMethod`."""

    lr: Positive
    lr_end: Share
    vary_targets: bool
    clip: Positive
    checkpoint: str | None

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Learning rate of each of the network's parameter groups."""
        return (self.lr,)


class TrainedMethod(EditMethod):
    """Builds networks, trains them with one Adam, and keeps them in small checkpoints.

    The gradient is summed over ranks here and not by DDP, so that every episode has the same
    weight even where some ranks leave episodes out.

    Args:
        base_model: The model to edit.
        lr: Learning rate of the networks.
        lr_end: Fraction of the learning rates that is left at the end of a fit; they fall linearly.
            It needs a fit of known length.
        vary_targets: Write another answer in each epoch, one that some record gives instead of the
            same old answer. It makes more of few records; they need ``target_old``.
        clip: Largest norm of the gradient of a training step.
        checkpoint: The checkpoint to start from: a file that ``fit`` wrote, or ``none`` for
            untrained networks. If absent, the checkpoint that is packaged with the base model is
            used to edit, where there is one that agrees with the other settings.
        seed: Start of all random choices; that of the run when absent.
    """

    #: The class of the method's plans.
    plan_type: ClassVar[type[Plan]]
    #: File name of the checkpoint that comes with a packaged base model; empty where none does.
    packaged: ClassVar[str] = ""
    settings_type: ClassVar[type[MethodSettings]] = TrainedSettings

    settings: TrainedSettings
    network: Any

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        lr: float = 1e-5,
        lr_end: float = 1.0,
        vary_targets: bool = False,
        clip: float = 100.0,
        checkpoint: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)
        self.automatic_optimization = False
        self.network = None
        self._learned_from = "nothing"
        self._alternatives: dict[str, list[str]] = {}

    # ---- what a method defines

    @abstractmethod
    def default_plan(self) -> Plan:
        """The architecture that the method has unless settings say otherwise."""
        raise NotImplementedError(f"{type(self).__name__} does not define default_plan")

    @abstractmethod
    def create(self, plan: Any) -> TrainedNetwork:
        """Untrained networks of an architecture."""
        raise NotImplementedError(f"{type(self).__name__} does not define create")

    @abstractmethod
    def batch_gradients(self, batch: EditBatch) -> Iterator[BatchGradient]:
        """Loss and gradient of each optimizer step of a training batch, over all ranks.

        Running statistics of the networks are updated, and nothing else.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define batch_gradients")

    # ---- building

    def build(self) -> None:
        """Create the networks, from a checkpoint where one is named or packaged.

        Raises:
            UnsupportedUseError: The named checkpoint was fitted with other settings.
            CheckpointError: It is absent, or another method's.
            BaseModelMismatchError: It was fitted on a base model of other shapes.
        """
        source = self.settings.checkpoint
        if source is None and self.packaged and not self._fitting:
            checkpoint = packaged_checkpoint(self.packaged, self.base)
            if checkpoint is not None and not self._disagreements(checkpoint):
                self._load(checkpoint, "the checkpoint packaged with the base model")
                return
        elif source not in (None, "none"):
            checkpoint = read_checkpoint(source)
            check_fitted_with(checkpoint, type(self).__name__, source)
            if differences := self._disagreements(checkpoint):
                raise UnsupportedUseError(
                    f"checkpoint '{source}' was fitted with {'; '.join(differences)}; leave these "
                    "settings out, or fit again"
                )
            self._load(checkpoint, source)
            return
        if self.network is None:  # else loaded by Lightning
            self._create(self.plan())

    def plan(self, saved: Any = None) -> Any:
        """The architecture that the settings ask for.

        Args:
            saved: The plan of a checkpoint, whose entries stand for settings left at ``None``;
                without one, those of :meth:`default_plan` do.
        """
        plan = self.default_plan() if saved is None else saved
        names = {field.name for field in fields(plan)}
        return replace(
            plan,
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in vars(self.settings).items()
                if name in names and value is not None
            },
        )

    def resolved_settings(self, plan: Any) -> Any:
        """The settings, with the values of a plan in place of those left at ``None``."""
        names = {field.name for field in fields(self.settings)}
        values = {name: value for name, value in plan.to_json().items() if name in names}
        return replace(self.settings, **values)

    def _create(self, plan: Plan) -> None:
        self.network = self.create(plan).to(self.base.device)
        self.settings = self.resolved_settings(plan)

    def _load(self, checkpoint: dict[str, Any], source: str) -> None:
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])
        self._learned_from = source

    def _disagreements(self, checkpoint: dict[str, Any]) -> list[str]:
        """Entries of a checkpoint's plan that differ from what the settings ask for."""
        saved = checkpoint["plan"]
        wanted = self.plan(self.plan_type.from_json(saved)).to_json()
        return [f"{k} {saved.get(k)!r}, not {v!r}" for k, v in wanted.items() if saved.get(k) != v]

    # ---- editing

    def prepare_edit(self, requests: Sequence[EditRequest]) -> EditOrigin:
        """Move the networks to the base model's device, and warn if they are untrained.

        Returns:
            The origin of the edit; it names the networks' checkpoint and counts their updates.
        """
        self.network.to(self.base.device)
        updates, name = int(self.network.updates), type(self).__name__
        if not (updates or self._fitting or self.settings.checkpoint == "none"):
            warnings.warn(
                f"{name} has not been fitted on base model '{self.base.name}' with these settings, "
                "and untrained networks edit poorly; run "
                f"`kedit fit -c methods/{name.lower()}` with your data and name the file it writes "
                "in `checkpoint`, or set `checkpoint` to none to use them as they are",
                stacklevel=2,
            )
        return self.origin(requests, learned_from=self._learned_from, updates=updates)

    # ---- training

    @property
    def _fitting(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    @property
    def epoch(self) -> int:
        """Number of the present pass over the training data; 0 without a trainer."""
        return self.current_epoch if self._trainer is not None else 0

    def on_fit_start(self) -> None:
        """Check the trainer, and collect the alternative answers of the training data.

        Raises:
            UnsupportedUseError: The precision is ``16-mixed``, whose losses must be scaled, or the
                learning rates are to fall in a fit of unknown length.
        """
        data = self.run.data
        if self.settings.vary_targets and isinstance(data, EditDataModule):
            examples = self.examples_to_fit(data.examples("train"))
            self._alternatives = alternatives(examples)
        endless = self.trainer.max_steps < 0 and (self.trainer.max_epochs or -1) < 0
        if self.settings.lr_end != 1.0 and endless:
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

    def examples_of(self, batch: EditBatch) -> Sequence[EditExample]:
        """The examples of a batch, with the answers that this epoch writes."""
        if not self._alternatives:
            return batch.examples
        return [
            with_another_target(example, self._alternatives, self.epoch, self.settings.start)
            for example in batch.examples
        ]

    def too_long(self, examples: Sequence[EditExample]) -> dict[str, str]:
        """Also those that would be with an answer that another epoch writes."""
        clauses = super().too_long(examples)
        if not (self.settings.vary_targets and self._fitting):
            return clauses
        left = [example for example in examples if example.id not in clauses]
        count = self.base.encoder.count
        longest = {old: [max(new, key=count)] for old, new in alternatives(left).items()}
        varied = [with_another_target(example, longest, 0, 0) for example in left]
        return clauses | super().too_long(varied)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam, with a learning rate for each parameter group of the networks."""
        pairs = zip(self.network.parameter_groups(), self.settings.learning_rates, strict=True)
        return torch.optim.Adam([{"params": parameters, "lr": lr} for parameters, lr in pairs])

    def training_step(self, batch: EditBatch, batch_idx: int) -> Tensor | None:
        """Compute the gradient of a batch of episodes, and step the optimizer.

        Episodes whose gradient is not finite are left out, counted and logged.
        """
        loss = None
        for gradient in self.batch_gradients(batch):
            self.network.skipped += gradient.skipped
            scalars = {"train/skipped_episodes": self.network.skipped.float()}
            if gradient.episodes:
                loss = gradient.loss
                scalars |= self.update_networks(gradient)
                self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
            self.log_dict(scalars, batch_size=len(batch))
        return loss

    def update_networks(self, gradient: BatchGradient) -> dict[str, Tensor]:
        """Step the optimizer with the clipped mean gradient; returns the scalars to log."""
        parameters = list(self.network.parameters())
        for parameter, mean in zip(parameters, gradient.mean_gradients, strict=True):
            parameter.grad = mean
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        self._schedule_learning_rates(optimizer.param_groups)
        optimizer.step()
        optimizer.zero_grad()
        self.network.updates += 1
        return {
            "train/gradient_norm": norm,
            **{f"train/{name}": value for name, value in gradient.scalars.items()},
            **{f"train/{name}": value for name, value in self.network.scalars().items()},
        }

    def _schedule_learning_rates(self, groups: list[dict[str, Any]]) -> None:
        """Set the learning rates of the present step on their way down to ``lr_end``.

        They follow from the number of the step or batch alone, so a resumed fit needs no further
        state. (Asking the trainer for the length before the fit would keep its loader from being
        resumed.)
        """
        end, trainer = self.settings.lr_end, self.trainer
        if end == 1.0:
            return
        done: float = trainer.global_step
        length: float = trainer.max_steps
        if length < 0:
            batches = trainer.num_training_batches
            done = trainer.current_epoch * batches + trainer.fit_loop.epoch_loop.batch_idx
            length = (trainer.max_epochs or -1) * batches
        left = 1 - (1 - end) * min(1.0, done / length)
        for group, lr in zip(groups, self.settings.learning_rates, strict=True):
            group["lr"] = left * lr

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the plan of the networks."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["plan"] = self.network.plan.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the networks the architecture of the checkpoint's.

        Raises:
            CheckpointError: The checkpoint is another method's.
            BaseModelMismatchError: The base model has other shapes than the checkpoint's.
        """
        check_fitted_with(checkpoint, type(self).__name__, "to load")
        super().on_load_checkpoint(checkpoint)
        plan = self.plan_type.from_json(checkpoint["plan"])
        if self.network is None or self.network.plan != plan:
            self._create(plan)
        self._learned_from = "a checkpoint"
        check_shapes(checkpoint, self.network.state_dict(), self.base.name)
