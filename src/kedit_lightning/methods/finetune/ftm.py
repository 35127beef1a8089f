"""Fine-tuning of single layers on the answers of the requests (FT-M)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.methods.finetune.shared.fine_tuning_method import (
    FineTuningMethod,
    FineTuningSettings,
)
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.methods.shared.answer_passes import Objective


@dataclass(frozen=True)
class FTMSettings(FineTuningSettings):
    """Settings of :class:`FTM`."""

    objective: Objective


class FTM(FineTuningMethod):
    """Fine-tunes the down projection of one block, or of a few, on the answers.

    FT-M is plain fine-tuning with the loss on the answer tokens alone. Many requests are trained
    together in epochs over all of them. The weights stay as they are: a separate change, which
    starts at zero, is trained. In a block that has routed experts and no other MLP it trains the
    experts that the router picks where answers are predicted. ``FTL`` bounds the change, and
    ``LocFTBF`` is made for many facts.
    Papers: https://arxiv.org/abs/2202.05262 (FT), https://arxiv.org/abs/2401.01286 (FT-M).

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks that are trained, negative numbers from the end. When absent the published
            ones of a known model, or else block 0.66 n of n, or the nearest one with a dense MLP.
        modules: Projections of each of them, by their names inside the block, such as
            ``mlp.up_proj``; the down projection of its MLP when absent.
        lr: Learning rate of Adam.
        steps: Maximum number of epochs over the requests; 25 when absent, unless published
            otherwise.
        batch_size: Requests of an optimizer step: 1 as in EasyEdit, about 64 in LocFT-BF, for
            thousands of requests. Few requests in large batches get too few steps.
        norm_constraint: Largest change of any entry of the weights (FT-L). When absent the
            published one of a known model, or else none; ``inf`` switches it off.
        objective: ``target_new`` predicts each answer token from the tokens before it;
            ``prompt_last`` predicts all of them from the last token of the prompt, as the released
            code of FT-L does, which is right for answers of one token only.
        weight_decay: L2 penalty on the change.
        stop_loss: A batch with a lower loss is skipped, and training ends once the mean loss of an
            epoch is lower.
        eos_in_target: Train the end-of-text token after each answer, against run-on answers.
        seed: Seed of the order of requests, which depends on the requests too.
    """

    settings_type: ClassVar[type[MethodSettings]] = FTMSettings
    settings: FTMSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        modules: list[str] | None = None,
        lr: float = 5e-4,
        steps: int | None = None,
        batch_size: int = 1,
        norm_constraint: float | None = None,
        objective: Objective = "target_new",
        weight_decay: float = 0.0,
        stop_loss: float = 1e-2,
        eos_in_target: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    @property
    def objective(self) -> Objective:
        """Where answer tokens are predicted."""
        return self.settings.objective
