"""The base of methods whose ``fit`` learns networks that later edits share."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.errors import BaseModelMismatchError, CheckpointError, UnsupportedUseError
from kedit_lightning.methods.method import EditMethod
from kedit_lightning.methods.training.checkpoint import packaged_checkpoint, read_checkpoint
from kedit_lightning.methods.training.episodes import alternatives, with_another_target
from kedit_lightning.methods.training.precision import FullPrecision
from kedit_lightning.requests import EditBatch, EditExample


@dataclass(frozen=True)
class Plan:
    """What fixes the shape and the meaning of learned tensors; checkpoints hold it."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_json`."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class LearnedNetwork(FullPrecision):
    """What a method learns, with counts of how far it has learned.

    Args:
        plan: What it is made of.
    """

    updates: Tensor
    skipped: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        #: Steps of the optimizer so far; 0 says that nothing was learned.
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        #: Training episodes left out because their gradient was not finite.
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the setting that holds their learning rate."""
        return {"lr": list(self.parameters())}

    def scalars(self) -> dict[str, Tensor]:
        """What is worth logging at each step."""
        return {}


class LearnedMethod(EditMethod):
    """Builds networks, from a checkpoint where there is one, and keeps checkpoints small.

    A subclass has the settings ``checkpoint`` and ``vary_targets`` and says what its networks are
    with :meth:`plan` and :meth:`create`.

    Args:
        base_model: The model to edit.
        seed: Start of all random choices.
    """

    #: What :meth:`plan` gives, for reading those of checkpoints.
    plan_type: ClassVar[type[Plan]]
    #: Checkpoint that comes with a packaged base model, by file name; empty where none does.
    packaged: ClassVar[str] = ""
    #: The settings that fix an entry of the plan; an entry is free when all of them are ``None``.
    settles: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    network: Any

    def __init__(self, base_model: BaseModel | BaseModelSpec | str = "nano", seed: int = 0) -> None:
        super().__init__(base_model, seed)
        self.network = None
        self._learned_from = "nothing"
        self._alternatives: dict[str, list[str]] = {}

    # ---- what a method defines

    @abstractmethod
    def plan(self) -> Plan:
        """The networks that the settings ask for."""
        raise NotImplementedError(f"{type(self).__name__} does not define plan")

    @abstractmethod
    def create(self, plan: Any) -> LearnedNetwork:
        """Untrained networks."""
        raise NotImplementedError(f"{type(self).__name__} does not define create")

    # ---- building

    def build(self) -> None:
        """Create the networks, from a checkpoint where one is named or comes with the base model.

        Raises:
            UnsupportedUseError: The named checkpoint was fitted with other settings.
            CheckpointError: It is absent, or another method's.
            BaseModelMismatchError: It was fitted on a base model of other shapes.
        """
        start = self.hparams["checkpoint"]
        if start is None and self.packaged and not self._fitting:
            checkpoint = packaged_checkpoint(self.packaged, self.base)
            if checkpoint is not None and not self._disagreements(checkpoint):
                self._adopt(checkpoint, "the checkpoint packaged with the base model")
                return
        elif start not in (None, "none"):
            checkpoint = read_checkpoint(start)
            self._check_maker(checkpoint, str(start))
            if wrong := self._disagreements(checkpoint):
                raise UnsupportedUseError(
                    f"checkpoint '{start}' was fitted with {'; '.join(wrong)}; leave these "
                    "settings out, or fit again"
                )
            self._adopt(checkpoint, str(start))
            return
        if self.network is None:  # else loaded by Lightning
            self._create(self.plan())

    def _create(self, plan: Plan) -> None:
        self.network = self.create(plan).to(self.base.device)

    def _adopt(self, checkpoint: dict[str, Any], source: str) -> None:
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])
        self._learned_from = source

    def _check_maker(self, checkpoint: dict[str, Any], source: str) -> None:
        maker = checkpoint["hyper_parameters"]["_class_path"].rpartition(".")[2]
        if maker != type(self).__name__:
            raise CheckpointError(
                f"checkpoint {source} was fitted with {maker}, not {type(self).__name__}; name one "
                "of this method"
            )

    def _disagreements(self, checkpoint: dict[str, Any]) -> list[str]:
        """Settings that were given and that a checkpoint was not fitted with."""
        made, own = checkpoint["plan"], self.plan().to_json()
        free = {
            entry
            for entry, settings in self.settles.items()
            if all(self.hparams[name] is None for name in settings)
        }
        return [
            f"{k} {made[k]!r}, not {own[k]!r}" for k in own if k not in free and made[k] != own[k]
        ]

    # ---- editing

    @property
    def learned(self) -> dict[str, Any]:
        """What an edit records about the networks it was computed with."""
        return {"learned_from": self._learned_from, "updates": int(self.network.updates)}

    def warn_if_untrained(self) -> None:
        """Warn when an edit is computed with networks that have learned nothing."""
        if int(self.network.updates) or self._fitting or self.hparams["checkpoint"] == "none":
            return
        name = type(self).__name__
        warnings.warn(
            f"{name} has not been fitted on base model '{self.base.name}' with these settings, and "
            f"untrained networks edit poorly; run `kedit fit -c methods/{name.lower()}` with your "
            "data and name the file it writes in `checkpoint`, or set `checkpoint` to none to use "
            "them as they are",
            stacklevel=2,
        )

    # ---- fitting

    @property
    def _fitting(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    def on_fit_start(self) -> None:
        """Collect the answers that may stand in for each other."""
        data = self.run.data
        if self.hparams["vary_targets"] and isinstance(data, EditDataModule):
            examples = self.examples_to_fit(data.examples("train"))
            self._alternatives = alternatives(examples)

    @property
    def turn(self) -> int:
        """Number of the present pass over the data."""
        return self.current_epoch if self._trainer is not None else 0

    def examples_of(self, batch: EditBatch) -> Sequence[EditExample]:
        """The examples of a batch, with the answers that this epoch writes."""
        if not self._alternatives:
            return batch.examples
        seed = self.hparams["seed"]
        return [with_another_target(e, self._alternatives, self.turn, seed) for e in batch.examples]

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the plan of the networks."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["plan"] = self.network.plan.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the networks the shape that the checkpoint's have.

        Raises:
            CheckpointError: The checkpoint is another method's.
            BaseModelMismatchError: The base model has other shapes than the checkpoint's.
        """
        self._check_maker(checkpoint, "to load")
        super().on_load_checkpoint(checkpoint)
        plan = self.plan_type.from_json(checkpoint["plan"])
        if self.network is None or self.network.plan != plan:
            self._create(plan)
        self._learned_from = "a checkpoint"
        for name, tensor in self.network.state_dict().items():
            found = checkpoint["state_dict"].get(f"network.{name}")
            if found is None or found.shape != tensor.shape:
                made = checkpoint["base_model"]["name"]
                raise BaseModelMismatchError(
                    f"the checkpoint was fitted on base model '{made}', whose projections have "
                    f"other shapes than those of '{self.base.name}' ('{name}' does not fit); fit "
                    "again"
                )
