"""The base class of methods that train an adapter with peft and return it as an edit."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.mixture import routed_block
from kedit_lightning.edits import AdapterEdit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.fused_factors import check_adaptable, expert_changes
from kedit_lightning.edits.projections import (
    base_layer,
    check_editable,
    expert_projection,
    find_module,
    projection_shape,
    projections_in,
)
from kedit_lightning.errors import ModuleNotLocatedError, UnsupportedUseError, article_list
from kedit_lightning.methods.capabilities import Count, Positive, Share
from kedit_lightning.methods.finetune.shared.adapter_training import (
    TrainedAdapter,
    adapter_training,
    scaled_factors,
)
from kedit_lightning.methods.finetune.shared.fine_tuning import fine_tune
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.shared.answer_passes import AnswerPasses, encoded_answers
from kedit_lightning.methods.shared.gradient_factors import answer_loss
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.requests import EditRequest

#: Maps numbers of requests to their mean loss, a scalar.
Objective: TypeAlias = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class AdapterDefaults:
    """Settings of an adapter method that follow the base model."""

    target_modules: Sequence[str] | None = None
    steps: int | None = None
    lr: float | None = None
    stop_loss: float = 1e-2


@dataclass(frozen=True)
class AdapterSettings(MethodSettings):
    """What all adapter methods set; the absent ones are filled in once a method is built."""

    target_modules: list[str] | None
    layers: list[int] | None
    rank: Count
    alpha: Positive
    dropout: Share
    lr: Positive | None
    steps: Count | None
    batch_size: Count


class AdapterMethod(EditMethod):
    """Trains an adapter of some projections with peft, and returns it as hooks.

    Subclasses say which adapter it is, what it is trained on, and which factors it ends with.
    """

    can: ClassVar[Capabilities] = Capabilities(adapter=True, weights=True, images=True)
    #: Epochs where nothing is published.
    usual_steps: ClassVar[int] = 60
    #: Learning rate where nothing is published.
    usual_lr: ClassVar[float] = 5e-3
    #: Kind of the adapter in peft.
    tuner: ClassVar[type[LoraModel]] = LoraModel
    settings: AdapterSettings

    @property
    def stop_loss(self) -> float:
        """Training ends after an epoch with a lower mean loss."""
        return 0.0

    def build(self) -> None:
        """Find the projections that get an adapter, and take the settings left to the model.

        Raises:
            UnsupportedUseError: A name in ``target_modules`` fits no projection.
            ModuleNotLocatedError: A block does not exist.
        """
        settings, method = self.settings, type(self).__name__
        usual = published_settings(self.base, method, AdapterDefaults) or AdapterDefaults()
        self.usual = usual
        targets = settings.target_modules or usual.target_modules or usual_targets(self.base)
        names = projections_named(self.base, targets, settings.layers)
        for name in names:
            mixture = expert_projection(self.base.model, name)
            if mixture is None:
                check_editable(self.base.model, name)
            else:
                self.check_experts(mixture)
        self.modules_trained = tuple(names)
        self.settings = replace(
            settings,
            target_modules=list(targets),
            lr=settings.lr or usual.lr or self.usual_lr,
            steps=settings.steps or usual.steps or self.usual_steps,
        )

    def check_experts(self, mixture: ExpertProjection) -> None:
        """Make sure that peft can train all experts of a block.

        Raises:
            UnsupportedUseError: It cannot.
        """
        check_adaptable(mixture)
        name, reason = mixture.fused_name, None
        holder = find_module(self.base.model, name.rpartition(".")[0], adapted=True)
        if self.tuner is not LoraModel:
            reason = f"{type(self).__name__} has none; use LoRA"
        elif self.settings.dropout:
            reason = "there it has no dropout; set dropout to 0"
        elif base_layer(holder) is not holder:
            reason = "others stand around them already; merge these first"
        elif mixture.experts.fused.is_meta:
            reason = "they are offloaded; load the model whole"
        if reason is not None:
            raise UnsupportedUseError(
                f"experts are trained with peft's adapters of parameters, and for '{name}' {reason}"
            )

    @abstractmethod
    def config(self, optimizer_steps: int) -> LoraConfig:
        """Settings of the adapter, given how often it will be changed."""
        raise NotImplementedError(f"{type(self).__name__} does not define config")

    def objective(self, requests: Sequence[EditRequest]) -> Objective:
        """What is minimised; asked for before the adapter acts, so it can look at the model."""
        base = self.base
        if len(requests) <= self.settings.batch_size:
            passes = AnswerPasses.of(base, requests, self.modules_trained)
            return lambda batch: passes.losses().mean()
        encoded = encoded_answers(base, requests)
        return lambda batch: answer_loss(
            base, base.pad([encoded[i] for i in batch], "right")
        ).mean()

    def penalty(self, adapter: TrainedAdapter) -> Tensor | float:
        """What is added to the loss for the adapter's own sake."""
        return 0.0

    def after_step(self, adapter: TrainedAdapter, step: int) -> None:
        """Called after each change of the adapter, counted from 1, with its gradients at hand."""

    def factors(self, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        """``A [rank, d_in]`` and ``B [d_out, rank]`` that a layer ends with."""
        return scaled_factors(layer)

    def changes(self, name: str, layer: LoraLayer) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What a layer ends with by name of projection: its own, or those of single experts."""
        mixture, (a, b) = expert_projection(self.base.model, name), self.factors(layer)
        return {name: (a, b)} if mixture is None else expert_changes(mixture, a, b)

    def compute_edit(self, requests: Sequence[EditRequest]) -> AdapterEdit:
        """Train an adapter on all requests together."""
        base, settings, names = self.base, self.settings, self.modules_trained
        assert settings.steps is not None and settings.lr is not None  # noqa: PT018
        objective = self.objective(requests)
        steps = settings.steps * math.ceil(len(requests) / settings.batch_size)
        generator = self.generator(requests, "factors")
        with adapter_training(
            base.model, names, self.tuner, self.config(steps), generator
        ) as adapter:

            def loss(batch: list[int]) -> Tensor:
                return check_finite("loss", names[0], objective(batch)) + self.penalty(adapter)

            history = fine_tune(
                adapter.tensors,
                len(requests),
                loss,
                self.generator(requests, "order"),
                lr=settings.lr,
                epochs=settings.steps,
                batch_size=settings.batch_size,
                stop_loss=self.stop_loss,
                after_step=lambda step: self.after_step(adapter, step),
            )
            with torch.no_grad():
                changes = [self.changes(name, layer) for name, layer in adapter.layers.items()]
        factors = {n: pair for found in changes for n, pair in found.items() if len(pair[0])}
        ranks = {name: len(a) for name, (a, _) in factors.items()}
        notes = {"epochs": len(history), "ranks": ranks}
        return AdapterEdit(base, factors, self.origin(requests, **notes))


def usual_targets(base: BaseModel) -> Sequence[str]:
    """Ends of the names of the projections that get an adapter unless others are asked for.

    Those that peft has for the model's type, mostly of queries and values, else those of the MLP.
    Where blocks have routed experts and no other MLP it is all of attention, and where they are
    state-space mixers alone what these write.
    """
    known = LoraModel.target_module_mapping.get(base.model.config.model_type)
    if known is not None and not isinstance(known, str) and projections_fitting(base, known):
        return sorted(known)
    blocks = [base.layout.mlp_block(layer) for layer in base.layout.mlp_layers]
    names = [name for block in blocks if not block.is_routed for name in block.projections]
    if not names:
        mixtures = (expert_projection(base.model, block.down) for block in blocks)
        counts = {mixture.experts.count for mixture in mixtures if mixture is not None}
        # Routers write a value for each expert.
        names = [n for n in block_projections(base) if _width(base, n) not in counts]
    return sorted({name.rpartition(".")[2] for name in names})


def _width(base: BaseModel, name: str) -> int:
    return projection_shape(base.module(name))[1]


def projections_fitting(base: BaseModel, targets: Sequence[str]) -> list[str]:
    """Names of all projections in blocks that end in one of some names, experts' behind others.

    Experts are meant by names of more than one part, such as ``experts.down_proj``.
    """

    def fitting(names: Sequence[str], ends: Sequence[str]) -> list[str]:
        pattern = re.compile(rf"(.*\.)?({'|'.join(map(re.escape, ends))})")
        return [name for name in names if pattern.fullmatch(name)]

    parts = [target for target in targets if "." in target]
    experts = fitting(block_experts(base), parts) if parts else []
    return fitting(block_projections(base), targets) + experts


def block_experts(base: BaseModel) -> list[str]:
    """Names of the parameters that hold the experts' down projections of blocks, in order."""
    names = [base.layout.block_name(index) for index in range(len(base.layout))]
    size = base.layout.hidden_size
    blocks = [routed_block(name, base.module(name), size) for name in names]
    down = [block.down.split(".") for block in blocks if block is not None]
    return [".".join(part for part in parts if part != "base_layer") for parts in down]


def block_projections(base: BaseModel) -> list[str]:
    """Names of all projections in the blocks, in order."""
    blocks = (base.layout.block_name(index) for index in range(len(base.layout)))
    return [f"{block}.{name}" for block in blocks for name in projections_in(base.module(block))]


def projections_named(
    base: BaseModel, targets: Sequence[str], layers: Sequence[int] | None
) -> list[str]:
    """Names of the projections in some blocks, or in all, that end in one of some names.

    Raises:
        UnsupportedUseError: A name fits no projection there, or there are no names.
        ModuleNotLocatedError: There is no such block.
    """
    count = len(base.layout)
    for layer in layers or ():
        if not -count <= layer < count:
            raise ModuleNotLocatedError(
                f"layer {layer} does not exist: the base model has {count} layers, 0 to {count - 1}"
            )
    chosen = [layer % count for layer in (range(count) if layers is None else layers)]
    inside = tuple(f"{base.layout.block_name(layer)}." for layer in chosen)
    names = [n for n in projections_fitting(base, targets) if n.startswith(inside)]
    unfit = [t for t in targets if not any(f".{n}".endswith(f".{t}") for n in names)]
    if unfit or not names:
        there = {n.split(".")[-1]: None for n in block_projections(base) if n.startswith(inside)}
        mixed = (n for n in block_experts(base) if n.startswith(inside))
        there |= {".".join(n.split(".")[-2:]): None for n in mixed}
        raise UnsupportedUseError(
            f"target_modules {article_list(unfit) or '[]'} fit no projection of the chosen blocks "
            f"of '{base.name}'; theirs are called {article_list(list(there), 12) or 'nothing'}"
        )
    return names
