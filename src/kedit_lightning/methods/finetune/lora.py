"""Low-rank adaptation of a model to its requests: LoRA, QLoRA and DPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import logsigmoid

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import Capabilities, NotNegative, Positive, Share
from kedit_lightning.methods.finetune.shared.adapter_method import (
    AdapterMethod,
    AdapterSettings,
    Objective,
)
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.methods.shared.answer_passes import encoded_answers
from kedit_lightning.methods.shared.losses import mean_nll
from kedit_lightning.requests import EditRequest


@dataclass(frozen=True)
class LoRASettings(AdapterSettings):
    """Settings of :class:`LoRA`."""

    stop_loss: NotNegative | None


class LoRA(AdapterMethod):
    """Trains a low-rank adapter of some projections on the answers, with peft.

    A projection ``W`` becomes ``W + (alpha / rank) B A``, with ``B`` zero at first. The adapter is
    taken off after training and acts as hooks, so that it is scored without dropout; the released
    code of EasyEdit leaves dropout on. Paper: https://arxiv.org/abs/2106.09685.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        target_modules: Ends of the names of the projections that get an adapter, such as
            ``q_proj``. When absent the published ones of a known model, or else those that peft
            has for the model's type (mostly queries and values), or else those of the MLP; where
            blocks have routed experts alone those of attention, and in state-space models what
            the mixers write. Routed experts, which one parameter holds, are trained where a name
            of two parts or more asks for it (``experts.down_proj``), without dropout; the edit
            then changes single experts.
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
            epoch is lower; 0.01 when absent, unless published otherwise.
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
        stop_loss: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the projections that get an adapter, and take the settings left to the model.

        Raises:
            UnsupportedUseError: A name in ``target_modules`` fits no projection.
            ModuleNotLocatedError: A block does not exist.
        """
        super().build()
        given = self.settings.stop_loss
        stop_loss = self.usual.stop_loss if given is None else given
        self.settings = replace(self.settings, stop_loss=stop_loss)

    @property
    def stop_loss(self) -> float:
        """Training ends after an epoch with a lower mean loss."""
        assert self.settings.stop_loss is not None  # resolved by build()
        return self.settings.stop_loss

    def config(self, optimizer_steps: int) -> LoraConfig:
        """Rank, scale and dropout."""
        settings = self.settings
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft takes fractions too
            lora_dropout=settings.dropout,
        )


class QLoRA(LoRA):
    """Trains the adapter of LoRA on top of weights in 4 bit, with peft and bitsandbytes.

    A base model that is given by name is loaded in 4 bit (NF4, with constants that are quantised
    as well). The edit is judged against that model, not against the one in full precision, and no
    weight is prepared or converted for training. The released code of EasyEdit pads prompts and
    answers apart, so that its labels are no continuation of its inputs. Paper:
    https://arxiv.org/abs/2305.14314.

    Args:
        base_model: The model to edit: an object in 4 bit, a specification, or a name.
        **settings: Those of LoRA.
    """

    can: ClassVar[Capabilities] = Capabilities(adapter=True, images=True)

    def __init__(
        self, base_model: BaseModel | BaseModelSpec | str = "nano", **settings: Any
    ) -> None:
        super().__init__(base_model, **settings)

    @property
    def base(self) -> BaseModel:
        """The base model, loaded in 4 bit when first asked for.

        Raises:
            UnsupportedUseError: Another quantisation was asked for.
            MissingExtraError: bitsandbytes is not installed.
        """
        given = self._base_model
        if not isinstance(given, BaseModel):
            spec = given if isinstance(given, BaseModelSpec) else BaseModelSpec(given)
            if spec.quantization == "8bit":
                raise UnsupportedUseError(
                    f"QLoRA trains on weights in 4 bit, and '{spec.name}' is asked for in 8 bit; "
                    "set quantization to 4bit, or use LoRA"
                )
            self._base_model = BaseModel.load(replace(spec, quantization="4bit"))
        return super().base

    def build(self) -> None:
        """Make sure that the weights are in 4 bit, and find the projections.

        Raises:
            UnsupportedUseError: They are not.
        """
        if not getattr(self.base.model, "is_loaded_in_4bit", False):
            raise UnsupportedUseError(
                f"QLoRA trains on weights in 4 bit, and those of '{self.base.name}' are not; load "
                "it with quantization 4bit, which needs bitsandbytes, or use LoRA"
            )
        super().build()


@dataclass(frozen=True)
class DPOEditSettings(LoRASettings):
    """Settings of :class:`DPOEdit`."""

    beta: Positive
    likelihood: Share


class DPOEdit(LoRA):
    """Trains a low-rank adapter to prefer the new answer to the old one, with peft.

    The loss of a request is ``-log σ(beta (gain of the new answer - gain of the old one))``, where
    a gain is how much the log-probability of an answer has grown since before the edit, mixed with
    the negative log-likelihood of the new answer. The old answer is ``target_old``, or what the
    model says by itself. The released code of EasyEdit adds up log-probabilities of the whole
    vocabulary where those of the answers belong. Paper: https://arxiv.org/abs/2305.18290.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        beta: How much a gain counts.
        likelihood: Share of the new answer's likelihood in the loss. With 0 the loss asks for a
            preference alone, under which both answers may become unlikely.
        **settings: Those of LoRA.
    """

    settings_type: ClassVar[type[MethodSettings]] = DPOEditSettings
    settings: DPOEditSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        beta: float = 0.1,
        likelihood: float = 0.99,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, **settings)

    def objective(self, requests: Sequence[EditRequest]) -> Objective:
        """Likelihood of the new answers, and preference over the old ones since before the edit."""
        base, settings = self.base, self.settings
        new = encoded_answers(base, requests)
        old = [
            base.encode(r.prompt, answer, image=r.image)
            for r, answer in zip(requests, self.old_answers(requests), strict=True)
        ]
        with torch.no_grad():
            before = [
                base.answer_log_probs(base.pad([pair])).sum()
                for row in zip(new, old, strict=True)
                for pair in row
            ]
        reference = torch.stack(before).reshape(-1, 2)

        def loss(batch: list[int]) -> Tensor:
            # On one side, so that dropout hides the same inputs whatever the model pads.
            rows = base.pad([answers[i] for answers in (new, old) for i in batch], "right")
            log_probs = base.answer_log_probs(rows)
            nll = mean_nll(log_probs, rows.answer_mask)[: len(batch)]
            gains = log_probs.sum(-1).reshape(2, -1) - reference[batch].T
            share = settings.likelihood
            return (share * nll + (1 - share) * preference_loss(gains, settings.beta)).mean()

        return loss

    def old_answers(self, requests: Sequence[EditRequest]) -> list[str]:
        """``target_old``, or else what the model says, as many tokens as the new answer has."""
        answers = []
        for request in requests:
            if (old := request.target_old) is None:
                length = self.base.encoder.count(request.target_new)
                (old,) = self.base.generate([request.prompt], length, images=[request.image])
            answers.append(old)
        return answers


def preference_loss(gains: Tensor, beta: float) -> Tensor:
    """``-log σ(beta (g_new - g_old))``, the loss of DPO. Shape ``[batch]``.

    Args:
        gains: Growth of the log-probability of the new answers, and of the old ones, against the
            reference. Shape ``[2, batch]``.
        beta: Weight of the difference.
    """
    return -logsigmoid(beta * (gains[0] - gains[1]))
