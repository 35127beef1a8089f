"""MEMOIR: a residual memory beside one projection, with sparse masks that depend on the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.taps import visiting
from kedit_lightning.edits import OverlapEdit, OverlapPlan
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.kinds.overlap.overlap_edit import (
    residual_memory,
    residual_output,
    stacked_overlap_edits,
)
from kedit_lightning.edits.projections import check_editable, compute_dtype, projection_shape
from kedit_lightning.edits.prompt_routing import from_prompt_end
from kedit_lightning.edits.weight_storage import device_of
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import (
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    PositiveShare,
)
from kedit_lightning.methods.memory.shared.background import openings
from kedit_lightning.methods.memory.shared.memory_passes import (
    PromptPasses,
    followed_layer,
    last_states,
)
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.shared.answer_passes import AnswerPasses
from kedit_lightning.methods.shared.contexts import sample_contexts
from kedit_lightning.methods.shared.losses import gradients_of
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.requests import EditRequest

#: Depth, as a share of the blocks, in models without published settings.
USUAL_DEPTH = 0.84
#: Share of the features in a mask: 4096 of 14336 as published.
_ACTIVE = 2 / 7
#: Lengths of the contexts, in tokens, and irrelevant prompts whose mean is taken.
_LENGTHS = (5, 10)
_IRRELEVANT = 100


@dataclass(frozen=True)
class MEMOIRDefaults:
    """Settings of :class:`MEMOIR` that follow the base model."""

    layer: int
    steps: int = 70
    lr: float = 1.0
    threshold: float = 0.6
    contexts: int = 10


@dataclass(frozen=True)
class MEMOIRSettings(MethodSettings):
    """Settings of :class:`MEMOIR`; those that follow the base model once it is built."""

    layer: int | None
    steps: Count | None
    lr: Positive | None
    active: Count | None
    threshold: PositiveShare | None
    contexts: CountOrZero | None
    stop_loss: NotNegative


class MEMOIR(EditMethod):
    """Writes facts into a residual memory beside one projection, each into columns of its own.

    The mask of a prompt are the largest features of the projection's input at its last token, sent
    through a fixed random permutation (TopHash). A fact is written into the columns of its mask
    alone. A prompt whose mask overlaps enough with that of a fact gets the columns of that fact,
    from its last token on; all other prompts pass bit for bit. Features are taken less their mean
    over openings of the packaged text. Paper: https://arxiv.org/abs/2506.07899.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layer: Block whose down projection gets the memory, negative numbers from the end. When
            absent the published one of a known model, or else one in the upper fifth.
        steps: Steps of plain gradient descent at most; 70 when absent, unless known otherwise.
        lr: Learning rate; 1 when absent, unless known otherwise for the model.
        active: Features in a mask; two in seven when absent, as published.
        threshold: Overlap, as a share of a mask, from which on a prompt counts as a fact's; 0.6
            when absent, unless known otherwise for the model.
        contexts: Texts by the model that stand before prompts in training; 10 when absent, unless
            known otherwise for the model.
        stop_loss: Training ends below this loss.
        seed: Seed of the permutation, the contexts and the irrelevant prompts.
    """

    can: ClassVar[Capabilities] = Capabilities(images=True)
    settings_type: ClassVar[type[MethodSettings]] = MEMOIRSettings
    settings: MEMOIRSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layer: int | None = None,
        steps: int | None = None,
        lr: float | None = None,
        active: int | None = None,
        threshold: float | None = None,
        contexts: int | None = None,
        stop_loss: float = 0.02,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the projection, take the settings left to the base model, and read what is typical.

        Raises:
            UnsupportedUseError: The projection cannot be edited, or has fewer features than a mask.
            ModuleNotLocatedError: The block does not exist or has no dense MLP.
        """
        settings, usual = self.settings, memoir_defaults(self.base)
        names = [field.name for field in fields(usual)]
        given = {n: getattr(settings, n) for n in names if getattr(settings, n) is not None}
        #: The settings that follow the base model.
        self.resolved = resolved = replace(usual, **given)
        module = self.base.layout.block(resolved.layer).down
        width = projection_shape(check_editable(self.base.model, module))[0]
        active = max(1, round(_ACTIVE * width)) if settings.active is None else settings.active
        if active > width:
            raise UnsupportedUseError(
                f"MEMOIR: active is {active}, and '{module}' has only {width} features"
            )
        values = {n: getattr(resolved, n) for n in names}
        self.settings = settings = replace(settings, active=active, **values)
        self.plan = OverlapPlan(module, active, settings.start, resolved.threshold)
        self._contexts = sample_contexts(
            self.base, resolved.contexts, settings.start, _LENGTHS if resolved.contexts else ()
        )
        with self.base.edits.suspended():
            prompts = openings(_IRRELEVANT, settings.start)
            self._centre = last_states(self.base, module, prompts).inputs.mean(0)

    def compute_edit(self, requests: Sequence[EditRequest]) -> OverlapEdit:
        """Train what the requests add to the columns of their masks."""
        base, plan = self.base, self.plan
        edits = stacked_overlap_edits(base, plan)
        with base.edits.without(OverlapEdit.family_of(plan)):
            passes = PromptPasses(base, requests, self._contexts, plan.module)
            centre = edits[0].centre.to(passes.keys) if edits else self._centre
            masks = plan.masks(passes.keys[:, 0], centre)
            start = self._start()
            trained, losses = self._train(passes, masks, start)
        values = (trained - start)[:, masks.any(0)]
        origin = self.origin(requests, steps=len(losses), loss=losses[-1])
        return OverlapEdit(base, plan, masks, values, centre, origin)

    def _start(self) -> Tensor:
        """The memory that the edits on the stack form, ``[d_out, d_in]``."""
        module = self.base.module(self.plan.module)
        device, dtype = device_of(module), compute_dtype(self.base.dtype)
        edits = stacked_overlap_edits(self.base, self.plan)
        if edits:
            return residual_memory(edits, device).change.to(dtype)
        d_in, d_out = projection_shape(module)
        return torch.zeros(d_out, d_in, dtype=dtype, device=device)

    def _train(
        self, passes: PromptPasses, masks: Tensor, start: Tensor
    ) -> tuple[Tensor, list[float]]:
        """The memory after training, and the losses."""
        base, module, resolved = self.base, self.plan.module, self.resolved
        change = start.clone().requires_grad_()
        losses: list[float] = []

        def residual(part: AnswerPasses, rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
            new = residual_output(x, y, change, masks[rows])
            return from_prompt_end(y, new, part.rows.prompt_end)

        for step in range(resolved.steps):
            part, rows = passes.step(step)
            with visiting(base.model, {module: partial(residual, part, rows)}):
                loss = check_finite("loss", module, part.losses().mean())
            losses.append(float(loss.detach()))
            if losses[-1] <= self.settings.stop_loss:
                break
            # Columns outside the masks get no gradient.
            (gradient,) = gradients_of(loss, [change])
            with torch.no_grad():
                change -= resolved.lr * gradient
        return change.detach(), losses


def memoir_defaults(base: BaseModel) -> MEMOIRDefaults:
    """Published settings of a known model, else defaults for its number of blocks."""
    known = published_settings(base, "MEMOIR", MEMOIRDefaults)
    return known or MEMOIRDefaults(followed_layer(base, USUAL_DEPTH))
