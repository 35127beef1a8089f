"""The base of hypernetworks: one training step, with clipping, schedule and logs."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.layout import Block, Layout
from kedit_lightning.edits.modules import check_editable, projection_shape
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.base import Capabilities, Need
from kedit_lightning.methods.episodes import Episode, make_episodes, probes_of
from kedit_lightning.methods.hypernetwork.outcome import Outcome
from kedit_lightning.methods.learned import LearnedMethod
from kedit_lightning.requests import EditBatch, EditExample


class HypernetworkMethod(LearnedMethod):
    """Steps networks on what edits cost that they have made.

    A subclass says with :meth:`learn` what a batch costs, and has the settings ``layers``,
    ``modules``, ``clip``, ``lr_end``, those of :meth:`draw_episodes`, and one learning rate for
    each of its networks'
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
    #: The same of each half of an encoder-decoder, as MEND's paper edits T5 and BART.
    last_blocks_of_half: ClassVar[int] = 2

    def __init__(self, base_model: BaseModel | BaseModelSpec | str = "nano", seed: int = 0) -> None:
        super().__init__(base_model, seed)
        self.automatic_optimization = False

    # ---- what a method defines

    @abstractmethod
    def learn(self, batch: EditBatch) -> Outcome:
        """Losses and gradient of a batch, over the episodes of all ranks.

        Takes the batch into the statistics of the normalisers, and changes nothing else.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define learn")

    # ---- building

    def edited_modules(self) -> tuple[str, ...]:
        """Names of the projections that the settings ask to edit, those of an encoder first."""
        modules: Iterable[str] | None = self.hparams["modules"]
        if modules is None:
            layout, halves = self.base.layout, self.base.is_encoder_decoder
            modules = [
                name
                for half in ([layout.encoder, layout] if halves else [layout])
                for i in self._layers_of(half)
                for name in self.projections_of(half.block(i))
            ]
        return tuple(dict.fromkeys(modules))

    def projections_of(self, block: Block) -> Sequence[str]:
        """Names of the projections of a block that are edited, unless modules are named."""
        return block.projections

    def _layers_of(self, layout: Layout) -> Iterable[int]:
        """The layers that the settings ask for, or else the last ones."""
        layers: Iterable[int] | None = self.hparams["layers"]
        if layers is not None:
            return layers
        last = self.last_blocks_of_half if self.base.is_encoder_decoder else self.last_blocks
        return range(max(0, len(layout) - last), len(layout))

    def shapes_of(self, modules: Sequence[str]) -> list[tuple[int, int]]:
        """``(d_in, d_out)`` of projections.

        Raises:
            UnsupportedUseError: A projection cannot be edited.
        """
        return [projection_shape(check_editable(self.base.model, name)) for name in modules]

    # ---- fitting

    def draw_episodes(self, examples: Sequence[EditExample], size: int) -> list[Episode]:
        """What is written and asked in this epoch, ``size`` examples an episode."""
        settings = self.hparams
        return make_episodes(
            examples,
            size,
            self.turn,
            settings["seed"],
            settings["n_rephrases"],
            settings["n_locality"],
            settings["own_wording"],
        )

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

    def outcomes(self, batch: EditBatch) -> Iterator[Outcome]:
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
