"""DEFER: a gate that decides whether a trained copy of a layer answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.taps import visiting
from kedit_lightning.edits import Deferral, DeferralEdit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.kinds.deferral.deferral_edit import stacked_deferral
from kedit_lightning.edits.projections import check_editable, compute_dtype, projection_shape
from kedit_lightning.edits.prompt_routing import from_prompt_end
from kedit_lightning.edits.weight_storage import device_of
from kedit_lightning.methods.capabilities import Count, NotNegative, Positive
from kedit_lightning.methods.memory.shared.memory_passes import PromptPasses, followed_layer
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.shared.answer_passes import AnswerPasses
from kedit_lightning.methods.shared.losses import gradients_of
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.requests import EditRequest

#: Depth, as a share of the blocks, in models without published settings.
USUAL_DEPTH = 0.84


@dataclass(frozen=True)
class DEFERDefaults:
    """Settings of :class:`DEFER` that follow the base model."""

    layer: int


@dataclass(frozen=True)
class DEFERSettings(MethodSettings):
    """Settings of :class:`DEFER`; ``layer`` once it is built."""

    layer: int | None
    lr: Positive
    steps: Count
    stop_loss: NotNegative


class DEFER(EditMethod):
    """Trains a gate, and a copy of a layer to which rows with an open gate are deferred.

    A baseline of the GRACE paper. While it is trained, the gate mixes the outputs of the layer and
    of its copy; afterwards it is hard: rows whose gate at the last prompt token is one half or more
    get the copy, from that token on. Nothing is done for locality, and later edits train the same
    gate and copy on: it forgets, as published. Unlike in the released code each row is decided by
    itself, also in a batch, and the copy starts from the layer's own weights.
    Paper: https://arxiv.org/abs/2211.11031.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layer: Block whose down projection is copied, negative numbers from the end. When absent
            the published one of a known model, or else one in the upper fifth.
        lr: Learning rate of Adam.
        steps: Steps of Adam at most.
        stop_loss: Training ends below this loss.
        seed: Unused; there is no random choice.
    """

    can: ClassVar[Capabilities] = Capabilities(images=True)
    settings_type: ClassVar[type[MethodSettings]] = DEFERSettings
    settings: DEFERSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layer: int | None = None,
        lr: float = 1e-2,
        steps: int = 100,
        stop_loss: float = 0.02,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the projection.

        Raises:
            UnsupportedUseError: The projection cannot be edited.
            ModuleNotLocatedError: The block does not exist or has no dense MLP.
        """
        layer = self.settings.layer
        layer = defer_defaults(self.base).layer if layer is None else layer
        self.module_name = self.base.layout.block(layer).down
        check_editable(self.base.model, self.module_name)
        self.settings = replace(self.settings, layer=layer)

    def compute_edit(self, requests: Sequence[EditRequest]) -> DeferralEdit:
        """Train the gate and the copy on, from where the edits on the stack have left them."""
        base, module = self.base, self.module_name
        projection = base.module(module)
        device, dtype = device_of(projection), compute_dtype(base.dtype)
        start = stacked_deferral(base, module)
        if start is None:
            start = Deferral.zero(*projection_shape(projection), dtype, device)
        start = start.to(device).to(dtype)
        with base.edits.without(DeferralEdit.family_of(module)):
            trained, losses = self._train(PromptPasses(base, requests, (), module), start)
        origin = self.origin(requests, steps=len(losses), loss=losses[-1])
        return DeferralEdit(base, module, trained.plus(start, -1.0), origin)

    def _train(self, passes: PromptPasses, start: Deferral) -> tuple[Deferral, list[float]]:
        """Gate and copy after training, and the losses."""
        settings, module = self.settings, self.module_name
        trained = Deferral(*(tensor.clone().requires_grad_() for tensor in start))
        optimizer = torch.optim.Adam(trained, lr=settings.lr)
        losses: list[float] = []

        def mix(part: AnswerPasses, rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
            new = soft_output(trained, passes.keys[rows, 0], x, y)
            return from_prompt_end(y, new, part.rows.prompt_end)

        for step in range(settings.steps):
            part, rows = passes.step(step)
            with visiting(self.base.model, {module: partial(mix, part, rows)}):
                loss = check_finite("loss", module, part.losses().mean())
            losses.append(float(loss.detach()))
            if losses[-1] <= settings.stop_loss:
                break
            gradients = gradients_of(loss, trained)
            for tensor, gradient in zip(trained, gradients, strict=True):
                tensor.grad = gradient
            optimizer.step()
        return Deferral(*(tensor.detach() for tensor in trained)), losses


def soft_output(deferral: Deferral, keys: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Output of training, ``g · copy + (1 - g) · layer``, with the gate ``g`` of each row.

    Args:
        deferral: Gate and copy.
        keys: Inputs at the last prompt tokens. Shape ``[n, d_in]``.
        x: Input of the layer. Shape ``[n, tokens, d_in]``.
        y: Output of the layer. Shape ``[n, tokens, d_out]``.
    """
    openness = deferral.openness(keys)[:, None, None]
    mixed = openness * deferral.output(x, y) + (1 - openness) * y.to(openness.dtype)
    return mixed.to(y.dtype)


def defer_defaults(base: BaseModel) -> DEFERDefaults:
    """Published settings of a known model, else defaults for its number of blocks."""
    known = published_settings(base, "DEFER", DEFERDefaults)
    return known or DEFERDefaults(followed_layer(base, USUAL_DEPTH))
