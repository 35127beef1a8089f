"""Low-rank adaptation of a model to its requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import LoraConfig

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.methods.capabilities import NotNegative
from kedit_lightning.methods.finetune.shared.adapter_method import AdapterMethod, AdapterSettings
from kedit_lightning.methods.method import MethodSettings


@dataclass(frozen=True)
class LoRASettings(AdapterSettings):
    """Settings of :class:`LoRA`."""

    stop_loss: NotNegative


class LoRA(AdapterMethod):
    """Trains a low-rank adapter of some projections on the answers, with peft.

    A projection ``W`` becomes ``W + (alpha / rank) B A``, with ``B`` zero at first. The adapter is
    taken off after training and acts as hooks, so that it is scored without dropout; the released
    code of EasyEdit leaves dropout on. Paper: https://arxiv.org/abs/2106.09685.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        target_modules: Ends of the names of the projections that get an adapter, such as
            ``q_proj``. When absent the published ones of a known model, or else those that peft
            has for the model's type (mostly queries and values), or else those of the MLP.
        layers: Blocks that get an adapter, negative numbers from the end; all when absent.
        rank: Rank of the adapter of each projection.
        alpha: Scale of the adapter, divided by its rank.
        dropout: Share of a projection's inputs that the adapter does not see in a step of
            training.
        lr: Learning rate of Adam; 0.005 when absent, unless published otherwise.
        steps: Maximum number of epochs over the requests; 60 when absent, unless published
            otherwise.
        batch_size: Requests of an optimizer step.
        stop_loss: A batch with a lower loss is skipped, and training ends once the mean loss of an
            epoch is lower.
        seed: Seed of the factors' start, of the dropout and of the order of requests, which depend
            on the requests too.
    """

    settings_type: ClassVar[type[MethodSettings]] = LoRASettings
    settings: LoRASettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        target_modules: list[str] | None = None,
        layers: list[int] | None = None,
        rank: int = 8,
        alpha: float = 32.0,
        dropout: float = 0.1,
        lr: float | None = None,
        steps: int | None = None,
        batch_size: int = 1,
        stop_loss: float = 1e-2,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    @property
    def stop_loss(self) -> float:
        """Training ends after an epoch with a lower mean loss."""
        return self.settings.stop_loss

    def config(self, optimizer_steps: int) -> LoraConfig:
        """Rank, scale and dropout."""
        settings = self.settings
        return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout)
