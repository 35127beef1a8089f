"""WISE: side memories beside one projection, with a routing by activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.taps import visiting
from kedit_lightning.edits import SideEdit, SidePlan
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.kinds.side.merging import Merge
from kedit_lightning.edits.kinds.side.side_edit import (
    shard_changes,
    side_output,
    stacked_side_edits,
)
from kedit_lightning.edits.projections import check_editable, compute_dtype, projection_shape
from kedit_lightning.edits.prompt_routing import from_prompt_end
from kedit_lightning.edits.weight_storage import device_of
from kedit_lightning.methods.capabilities import (
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    PositiveShare,
)
from kedit_lightning.methods.memory.shared.background import Background
from kedit_lightning.methods.memory.shared.memory_passes import (
    PromptPasses,
    followed_layer,
    last_states,
)
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.shared.answer_passes import AnswerPasses
from kedit_lightning.methods.shared.contexts import sample_contexts
from kedit_lightning.methods.shared.losses import check_reached, gradients_of
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.requests import EditRequest

#: Depth, as a share of the blocks, in models without published settings.
USUAL_DEPTH = 0.84
#: Lengths of the contexts, in tokens.
_LENGTHS = (5, 10)


@dataclass(frozen=True)
class WISEDefaults:
    """Settings of :class:`WISE` that follow the base model."""

    layer: int
    projection: int = -1
    steps: int = 70
    lr: float = 1.0
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    activation_ratio: float = 0.88
    shard_size: int = 500
    shards_per_memory: int = 2
    mask_ratio: float = 0.2
    contexts: int = 10
    irrelevant: int = 8
    decay: bool = False


@dataclass(frozen=True)
class WISESettings(MethodSettings):
    """Settings of :class:`WISE`; those that follow the base model once it is built."""

    layer: int | None
    steps: Count | None
    lr: Positive | None
    alpha: NotNegative | None
    beta: NotNegative | None
    gamma: NotNegative | None
    activation_ratio: PositiveShare | None
    mask_ratio: PositiveShare | None
    norm_constraint: Positive
    shard_size: Count | None
    shards_per_memory: Count | None
    merge: Merge
    density: PositiveShare
    retrieve: bool
    replay: CountOrZero
    contexts: CountOrZero | None
    irrelevant: Count | None
    background: str | None
    decay: bool | None
    stop_loss: NotNegative


class Shard(NamedTuple):
    """What an edit is trained on: the shard's number, its change so far, and facts to replay."""

    number: int
    start: Tensor
    earlier: list[EditRequest]


class WISE(EditMethod):
    """Writes facts into a side memory, a change beside one projection that some prompts get.

    The change acts on a prompt, from its last token on, if its norm there, the routing activation,
    is above a threshold; all other prompts pass bit for bit. Training lowers the loss of the
    answers and keeps activations of the facts' prompts apart from those of irrelevant ones. Each
    shard of facts may change a random share of the entries. Shards are merged into memories, and of
    several memories the one with the largest activation answers. Unlike in the released code,
    nothing outside a mask decays, each row is routed by itself, and its decision is kept for the
    answer. Irrelevant prompts need no data: they are a request's own prompt about subjects that the
    model itself names, and plain text.
    Paper: https://arxiv.org/abs/2405.14768.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layer: Block whose down projection gets the side memory, negative numbers from the end. When
            absent the published one of a known model, or else one in the upper fifth.
        steps: Steps of plain gradient descent at most; 70 when absent, unless published otherwise.
        lr: Learning rate; 1 when absent, unless published otherwise.
        alpha: Largest activation of irrelevant prompts that costs nothing; 5 when absent, unless
            published otherwise, as ``beta`` and ``gamma``, 20 and 10.
        beta: Smallest activation of the facts' prompts that costs nothing.
        gamma: Smallest difference between the two that costs nothing.
        activation_ratio: A memory answers if the activation is above this share of the smallest one
            among its own facts; 0.88 when absent, unless published otherwise.
        mask_ratio: Share of the projection's entries that a shard may change; 0.2 when absent,
            unless known otherwise for the model.
        norm_constraint: Largest change of an entry.
        shard_size: Facts of a shard; facts that are written together stay together. 500 when
            absent, unless known otherwise for the model.
        shards_per_memory: Shards that are merged into one memory; 2 when absent, unless known
            otherwise for the model.
        merge: How: ``ties``, ``dare_ties``, ``dare_linear``, ``linear``, ``sign`` or ``slerp``.
        density: Share of the entries that TIES and DARE keep.
        retrieve: Keep several memories and retrieve one; else all shards are merged into one.
        replay: Earlier facts of the shard that are trained along with new ones.
        contexts: Texts by the model that stand before prompts in training; 10 when absent, unless
            known otherwise for the model.
        irrelevant: Irrelevant prompts of a request; 8 when absent, unless known otherwise for the
            model.
        background: File of irrelevant prompts, one a line, in place of the usual ones.
        decay: Let the learning rate start at ``lr`` for each fact that is trained, since the loss
            is a mean over them, and fall to zero over the steps; as published it stays at ``lr``,
            which is the default unless known otherwise for the model.
        stop_loss: Training ends below this loss, the penalty of the activations included.
        seed: Seed of masks and contexts, and, together with the requests, of irrelevant prompts.
    """

    can: ClassVar[Capabilities] = Capabilities(images=True)
    settings_type: ClassVar[type[MethodSettings]] = WISESettings
    settings: WISESettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layer: int | None = None,
        steps: int | None = None,
        lr: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        activation_ratio: float | None = None,
        mask_ratio: float | None = None,
        norm_constraint: float = 1.0,
        shard_size: int | None = None,
        shards_per_memory: int | None = None,
        merge: Merge = "ties",
        density: float = 0.53,
        retrieve: bool = True,
        replay: int = 0,
        contexts: int | None = None,
        irrelevant: int | None = None,
        background: str | None = None,
        decay: bool | None = None,
        stop_loss: float = 0.02,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the projection, take the settings left to the base model, and write contexts.

        Raises:
            UnsupportedUseError: The projection cannot be edited.
            ModuleNotLocatedError: The block does not exist or has no dense MLP.
        """
        settings, usual = self.settings, wise_defaults(self.base)
        given_layer = settings.layer
        names = [f.name for f in fields(usual) if f.name in vars(settings)]
        given = {n: getattr(settings, n) for n in names if getattr(settings, n) is not None}
        #: The settings that follow the base model.
        self.resolved = resolved = replace(usual, **given)
        self.settings = settings = replace(settings, **{n: getattr(resolved, n) for n in names})
        projection = usual.projection if given_layer is None else -1
        module = self.base.layout.block(resolved.layer).projections[projection]
        check_editable(self.base.model, module)
        self.plan = SidePlan(
            module=module,
            mask_ratio=resolved.mask_ratio,
            mask_seed=settings.start,
            shards_per_memory=resolved.shards_per_memory if settings.retrieve else 0,
            merge=settings.merge,
            density=settings.density,
            activation_ratio=resolved.activation_ratio,
        )
        self._background = Background(
            self.base, settings.start, settings.background, resolved.irrelevant
        )
        self._contexts = sample_contexts(
            self.base, resolved.contexts, settings.start, _LENGTHS if resolved.contexts else ()
        )

    def compute_edit(self, requests: Sequence[EditRequest]) -> SideEdit:
        """Train what the requests add to the shard that comes next."""
        base, plan = self.base, self.plan
        shard = self._shard(requests)
        with base.edits.without(SideEdit.family_of(plan)):
            trained, keys, losses = self._train([*requests, *shard.earlier], shard)
        added = trained - shard.start
        mask = plan.mask((added.shape[0], added.shape[1]), shard.number).to(added.device)
        origin = self.origin(requests, shard=shard.number, steps=len(losses), loss=losses[-1])
        return SideEdit(base, plan, shard.number, added[mask], keys[: len(requests)], origin)

    def _shard(self, requests: Sequence[EditRequest]) -> Shard:
        """The last shard on the stack, or a new one if that is full."""
        edits = stacked_side_edits(self.base, self.plan)
        number = max((edit.shard for edit in edits), default=0)
        members = [edit for edit in edits if edit.shard == number]
        if sum(len(edit.keys) for edit in members) >= self.resolved.shard_size:
            number, members = number + 1, []
        weight = self.base.module(self.plan.module)
        d_in, d_out = projection_shape(weight)
        device = device_of(weight)
        start = torch.zeros(d_out, d_in, dtype=compute_dtype(self.base.dtype), device=device)
        start = shard_changes(members)[number].to(start) if members else start
        facts = [request for edit in members for request in edit.origin.requests]
        order = torch.randperm(len(facts), generator=self.generator(requests, "replay"))
        return Shard(number, start, [facts[i] for i in order[: self.settings.replay].tolist()])

    def _train(
        self, requests: Sequence[EditRequest], shard: Shard
    ) -> tuple[Tensor, Tensor, list[float]]:
        """The shard's change after training, keys of the bare prompts ``[n, d_in]``, and losses."""
        base, plan, settings, resolved = self.base, self.plan, self.settings, self.resolved
        passes = PromptPasses(base, requests, self._contexts, plan.module)
        irrelevant = self._irrelevant_keys(requests)
        change = shard.start.clone().requires_grad_()
        mask = plan.mask((change.shape[0], change.shape[1]), shard.number).to(change)
        losses: list[float] = []
        rates = [resolved.lr] * resolved.steps
        if resolved.decay:
            rates = falling_rates(resolved.lr, len(requests), resolved.steps)

        def side(part: AnswerPasses, x: Tensor, y: Tensor) -> Tensor:
            return from_prompt_end(y, side_output(x, y, change), part.rows.prompt_end)

        for step in range(resolved.steps):
            part, _ = passes.step(step)
            with visiting(base.model, {plan.module: partial(side, part)}):
                nll = part.losses().mean()
            check_reached(nll)
            routing = margin_loss(
                routing_activations(passes.keys, change),
                routing_activations(irrelevant, change),
                resolved.alpha,
                resolved.beta,
                resolved.gamma,
            )
            loss = check_finite("loss", plan.module, nll + routing)
            losses.append(float(loss.detach()))
            if losses[-1] <= settings.stop_loss:
                break
            (gradient,) = gradients_of(loss, [change])
            with torch.no_grad():
                change -= rates[step] * gradient * mask
                change.clamp_(-settings.norm_constraint, settings.norm_constraint)
        return change.detach(), passes.keys[:, 0], losses

    def _irrelevant_keys(self, requests: Sequence[EditRequest]) -> Tensor:
        """Keys of prompts that have nothing to do with each request, ``[n, prompts, d_in]``."""
        prompts = self._background.of(requests, self.resolved.irrelevant)
        every = [prompt for own in prompts for prompt in own]
        keys = last_states(self.base, self.plan.module, every).inputs
        return keys.reshape(len(prompts), -1, keys.shape[-1])


def falling_rates(lr: float, facts: int, steps: int) -> list[float]:
    """The learning rate of each step, from ``lr`` for each of the facts down towards zero.

    >>> falling_rates(0.5, facts=20, steps=4)
    [10.0, 7.5, 5.0, 2.5]
    """
    return [lr * facts * (1 - step / steps) for step in range(steps)]


def routing_activations(keys: Tensor, change: Tensor) -> Tensor:
    """Norm of the change of the output, ``[n, rows]``, of keys ``[n, rows, d_in]``."""
    # The square root has no gradient at zero, where training starts.
    return (keys @ change.T).pow(2).sum(-1).clamp(min=1e-12).sqrt()


def margin_loss(
    relevant: Tensor, irrelevant: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """WISE's loss on activations: zero where all three margins hold.

    ``max(0, Δ(x_i) - α) + max(0, β - Δ(x_e)) + max(0, γ - (Δ(x_e) - Δ(x_i)))``, each averaged.

    Args:
        relevant: Activations of the facts' prompts, ``Δ(x_e)``. Shape ``[n, rows]``.
        irrelevant: Those of irrelevant prompts, ``Δ(x_i)``. Shape ``[n, prompts]``.
        alpha: Largest one of irrelevant prompts.
        beta: Smallest one of the facts' prompts.
        gamma: Smallest difference.
    """
    apart = relevant[:, :, None] - irrelevant[:, None, :]
    parts = (irrelevant - alpha, beta - relevant, gamma - apart)
    return torch.stack([part.clamp(min=0).mean() for part in parts]).sum()


def wise_defaults(base: BaseModel) -> WISEDefaults:
    """Published settings of a known model, else defaults for its number of blocks."""
    known = published_settings(base, "WISE", WISEDefaults)
    return known or WISEDefaults(followed_layer(base, USUAL_DEPTH))
