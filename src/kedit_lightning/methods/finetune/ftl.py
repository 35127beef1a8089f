"""Fine-tuning inside a box around the weights (FT-L)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.methods.finetune.shared.fine_tuning_method import (
    FinetuneDefaults,
    FineTuningMethod,
    FineTuningSettings,
)
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.methods.shared.answer_passes import Objective

#: The published boxes of GPT-2 medium, large and XL and of GPT-J, 2e-3 to 5e-5, shrink with the
#: hidden size ``d`` as ``2e-3 (1024 / d) ** 2.6`` to within a quarter.
_BOX, _WIDTH, _POWER = 2e-3, 1024, 2.6


@dataclass(frozen=True)
class FTLSettings(FineTuningSettings):
    """Settings of :class:`FTL`."""

    legacy_easyedit_objective: bool


class FTL(FineTuningMethod):
    """Fine-tunes the down projection of one block, with a bound on the change of each weight.

    The bound keeps neighbours of a fact as they are, and leaves rephrased prompts behind, as
    published. Paper: https://arxiv.org/abs/2202.05262 (FT+L), after
    https://arxiv.org/abs/2012.00363. The released code reads all answer tokens from the last
    position of the prompt, which is right for answers of one token only; published figures of FT-L
    for models since GPT-2 depend on it.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks that are trained, negative numbers from the end. When absent the published
            ones of a known model, or else block 0.66 n of n, or the nearest one with a dense MLP.
        modules: Projections of each of them, by their names inside the block, such as
            ``mlp.up_proj``; the down projection of its MLP when absent.
        lr: Learning rate of Adam.
        steps: Maximum number of epochs over the requests; 25 when absent, unless published
            otherwise.
        batch_size: Requests of an optimizer step.
        norm_constraint: Largest change of any entry of the weights. When absent the published one
            of a known model, or else one that shrinks with the hidden size as the published ones
            do; ``inf`` switches it off.
        weight_decay: L2 penalty on the change.
        stop_loss: A batch with a lower loss is skipped, and training ends once the mean loss of an
            epoch is lower.
        eos_in_target: Train the end-of-text token after each answer, against run-on answers.
        legacy_easyedit_objective: Predict all answer tokens from the last token of the prompt, as
            the released code does.
        seed: Seed of the order of requests, which depends on the requests too.
    """

    settings_type: ClassVar[type[MethodSettings]] = FTLSettings
    settings: FTLSettings
    published: ClassVar[str] = "FTL"

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        modules: list[str] | None = None,
        lr: float = 5e-4,
        steps: int | None = None,
        batch_size: int = 1,
        norm_constraint: float | None = None,
        weight_decay: float = 0.0,
        stop_loss: float = 1e-2,
        eos_in_target: bool = False,
        legacy_easyedit_objective: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    @property
    def objective(self) -> Objective:
        """Where answer tokens are predicted."""
        return "prompt_last" if self.settings.legacy_easyedit_objective else "target_new"

    def usual(self) -> FinetuneDefaults:
        """Settings for the base model where none are given; there is always a bound."""
        usual = super().usual()
        if usual.norm_constraint < inf:
            return usual
        return replace(usual, norm_constraint=usual_box(self.base.layout.hidden_size))


def usual_box(hidden_size: int) -> float:
    """Bound of the change of a weight, for models without a published one.

    >>> [f"{usual_box(width):.1g}" for width in (1024, 1280, 1600, 4096)]
    ['0.002', '0.001', '0.0006', '5e-05']
    """
    return float(_BOX * (_WIDTH / hidden_size) ** _POWER)
