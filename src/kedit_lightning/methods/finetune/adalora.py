"""Low-rank adaptation that shares out its rank among the projections while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import Count, NotNegative
from kedit_lightning.methods.finetune.shared.adapter_method import AdapterMethod, AdapterSettings
from kedit_lightning.methods.finetune.shared.adapter_training import ADAPTER, TrainedAdapter
from kedit_lightning.methods.method import MethodSettings

#: Shares of the training in which all ranks are kept, and in which the chosen ones are settled.
WARM_UP, SETTLED = 0.1, 0.3


@dataclass(frozen=True)
class AdaLoRASettings(AdapterSettings):
    """Settings of :class:`AdaLoRA`."""

    initial_rank: Count
    orthogonality: NotNegative


class AdaLoRA(AdapterMethod):
    """Trains an adapter whose rank goes where the answers need it, with peft.

    A projection ``W`` becomes ``W + (alpha / initial_rank) P Λ Q``. During training the rank of all
    projections together shrinks from ``initial_rank`` to ``rank`` each, by what the loss is
    sensitive to: all are kept for the first tenth of the steps, and the choice is final for the
    last three. The released code of EasyEdit never shares out the rank, and so trains all of
    ``initial_rank`` everywhere. Paper: https://arxiv.org/abs/2303.10512.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        target_modules: Ends of the names of the projections that get an adapter, such as
            ``q_proj``. When absent the published ones of a known model, or else those that peft
            has for the model's type (mostly queries and values), or else those that LoRA takes.
        layers: Blocks that get an adapter, negative numbers from the end; all when absent.
        rank: Rank of a projection on average, once training ends.
        initial_rank: Rank of every projection at first.
        alpha: Scale of the adapter, divided by ``initial_rank``.
        dropout: Share of a projection's inputs that the adapter does not see in a step of
            training.
        lr: Learning rate of Adam; 0.005 when absent, unless published otherwise.
        steps: Number of epochs over the requests; 70 when absent, unless published otherwise. All
            are run, since the rank is shared out over them.
        batch_size: Requests of an optimizer step.
        orthogonality: Weight of the penalty by which ``P`` and ``Q`` stay orthogonal.
        seed: Seed of the factors' start, of the dropout and of the order of requests, which depend
            on the requests too.
    """

    settings_type: ClassVar[type[MethodSettings]] = AdaLoRASettings
    usual_steps: ClassVar[int] = 70
    tuner: ClassVar[type[LoraModel]] = AdaLoraModel
    settings: AdaLoRASettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        target_modules: list[str] | None = None,
        layers: list[int] | None = None,
        rank: int = 8,
        initial_rank: int = 12,
        alpha: float = 32.0,
        dropout: float = 0.1,
        lr: float | None = None,
        steps: int | None = None,
        batch_size: int = 1,
        orthogonality: float = 0.5,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the projections, and check that there is rank to share out.

        Raises:
            UnsupportedUseError: ``initial_rank`` is not above ``rank``.
        """
        super().build()
        settings = self.settings
        if settings.initial_rank <= settings.rank:
            raise UnsupportedUseError(
                f"AdaLoRA shares out rank that it can take away: initial_rank "
                f"({settings.initial_rank}) must be above rank ({settings.rank}); LoRA trains a "
                "fixed one"
            )

    def config(self, optimizer_steps: int) -> LoraConfig:
        """Ranks, scale, dropout and the schedule of the rank.

        Raises:
            UnsupportedUseError: There are too few steps.
        """
        if optimizer_steps < 2:
            raise UnsupportedUseError(
                "AdaLoRA shares out the rank over at least two steps of the optimizer; set steps "
                "to 2 or more"
            )
        settings = self.settings
        return AdaLoraConfig(
            init_r=settings.initial_rank,
            target_r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft takes fractions too
            lora_dropout=settings.dropout,
            tinit=int(WARM_UP * optimizer_steps),
            tfinal=int(SETTLED * optimizer_steps),
            total_step=optimizer_steps,
            orth_reg_weight=settings.orthogonality,
        )

    def penalty(self, adapter: TrainedAdapter) -> Tensor | float:
        """Weighted distance of ``P`` and ``Q`` of all projections from orthogonal ones."""
        layers: Any = adapter.layers.values()
        pairs = [(layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for layer in layers]
        distances = [orthogonality(rows) for q, p in pairs for rows in (q, p.T)]
        return self.settings.orthogonality * torch.stack(distances).mean()

    def after_step(self, adapter: TrainedAdapter, step: int) -> None:
        """Take rank from where the loss needs it least."""
        tuner: Any = adapter.tuner
        tuner.update_and_allocate(step)

    def factors(self, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        """The kept rows of ``Λ Q``, and the columns of ``P`` with the scale: ``A`` and ``B``."""
        parts: Any = layer
        q, values, p = (part[ADAPTER] for part in (parts.lora_A, parts.lora_E, parts.lora_B))
        kept = values[:, 0] != 0
        scale = parts.scaling[ADAPTER] / (parts.ranknum[ADAPTER] + 1e-5)
        return (q * values)[kept].detach(), (p * scale)[:, kept].detach()


def orthogonality(rows: Tensor) -> Tensor:
    """Distance ``||M Mᵀ - I||`` of a matrix from one with orthogonal rows of length 1, a scalar.

    Args:
        rows: The matrix ``M``. Shape ``[rank, width]``.
    """
    gram = rows @ rows.T
    one = torch.eye(len(gram), dtype=gram.dtype).to(gram.device)
    distance: Tensor = torch.linalg.matrix_norm(gram - one)
    return distance
