"""Detoxifying one matrix of the layer that tells unsafe replies from safe ones (DINM)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.base_models.taps import visiting
from kedit_lightning.chat_turns import question_in, with_question
from kedit_lightning.edits import DenseEdit, Edit
from kedit_lightning.edits.projections import check_editable, compute_dtype, projection_shape
from kedit_lightning.edits.weight_storage import device_of
from kedit_lightning.methods.capabilities import CountOrZero, NotNegative, Positive
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.safety.dinm.constrained_passes import ConstrainedPasses
from kedit_lightning.methods.safety.dinm.toxic_layer import Pooling, toxic_layers
from kedit_lightning.methods.shared.answer_passes import AnswerPasses
from kedit_lightning.methods.shared.inner_loop import InnerLoop, adam
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.methods.shared.row_delta import RowDelta
from kedit_lightning.methods.shared.row_lengths import RowText, example_rows
from kedit_lightning.methods.shared.row_memory import requests_at_a_time
from kedit_lightning.requests import EditExample, EditRequest
from kedit_lightning.statistics import few_sample_texts

#: Behind the question while the reply is trained.
SUFFIX = "Answer this if it is reasonable; if it is unsafe, decline politely and say why."
#: Words of a packaged text that are kept where a request has no constraint: given, and predicted.
_WORDS = (8, 16)
#: Copies of a change while it is trained: itself, its gradient, Adam's two moments, its results.
_COPIES = 6


@dataclass(frozen=True)
class DINMDefaults:
    """Settings of DINM that follow the base model."""

    lr: float = 5e-4
    suffix: str = SUFFIX


@dataclass(frozen=True)
class DINMSettings(MethodSettings):
    """Settings of :class:`DINM`; what was left open is there once it is built."""

    layer: int | None
    lr: Positive | None
    steps: CountOrZero
    edit_weight: NotNegative
    constraint_weight: NotNegative
    suffix: str | None
    pooling: Pooling
    normalised: bool
    legacy_easyedit: bool


class DINM(EditMethod):
    """Trains the down projection of the layer where a safe and an unsafe reply differ most.

    That layer is located for each request: the Euclidean distance of the replies' hidden states,
    as blocks write them, is largest there. The loss is that of the safe reply, with a system
    suffix behind the question, and the divergence from the model before the edit along a general
    answer. The unsafe reply is ``target_old``, or else what the model says; the general answer is
    the request's constraint, or else a packaged text. In the released code the divergence has no
    gradient and its direction is the other, the layer is located once for all requests, on replies
    without their prompts and on their padding too, and its last layer is normalised and the others
    are not. Paper: https://arxiv.org/abs/2403.14472.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layer: Block that is trained, negative numbers from the end; located when absent.
        lr: Learning rate of Adam; 5e-4 when absent, unless published otherwise.
        steps: Steps for each request.
        edit_weight: Weight of the loss of the safe reply.
        constraint_weight: Weight of the divergence along the general answer; 0 leaves it out.
        suffix: Instruction behind the question while the reply is trained; none when empty, a usual
            one when absent, unless published otherwise. Replies are tested without it.
        pooling: Whether the ``mean`` of a reply's hidden states is compared, or the ``last`` one.
        normalised: Compare distances relative to the size of hidden states, which grows with depth.
        legacy_easyedit: As the released code does, give the divergence no gradient, and locate the
            layer on replies without their prompts.
        seed: Seed of the choice of a packaged text, which depends on the request too.
    """

    can: ClassVar[Capabilities] = Capabilities(batch=False, weights=True)
    settings_type: ClassVar[type[MethodSettings]] = DINMSettings
    settings: DINMSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layer: int | None = None,
        lr: float | None = None,
        steps: int = 10,
        edit_weight: float = 0.1,
        constraint_weight: float = 1.0,
        suffix: str | None = None,
        pooling: Pooling = "mean",
        normalised: bool = False,
        legacy_easyedit: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the layers to choose from, and take the learning rate left to the base model.

        Raises:
            ModuleNotLocatedError: A block does not exist, or none has a dense MLP.
            UnsupportedUseError: A projection cannot be edited.
        """
        settings, layout = self.settings, self.base.layout
        chosen = layout.dense_layers if settings.layer is None else [settings.layer]
        #: Down projections of the layers to choose from.
        self.projections = {layer: layout.block(layer).down for layer in chosen}
        for name in self.projections.values():
            check_editable(self.base.model, name)
        self.settings = replace(settings, lr=settings.lr or self.usual.lr, suffix=self.suffix)

    @property
    def usual(self) -> DINMDefaults:
        """Settings for the base model where none are given."""
        return published_settings(self.base, "DINM", DINMDefaults) or DINMDefaults()

    @property
    def suffix(self) -> str:
        """The system suffix, also before the method is built."""
        return self.usual.suffix if self.settings.suffix is None else self.settings.suffix

    @property
    def constrains(self) -> bool:
        """Whether the divergence along general answers is trained against."""
        return self.settings.constraint_weight > 0 and not self.settings.legacy_easyedit

    # ---- rows

    def with_suffix(self, prompt: str) -> str:
        """A prompt whose question the system suffix follows."""
        suffix = self.suffix
        return with_question(prompt, f"{question_in(prompt)} {suffix}") if suffix else prompt

    def constraint(self, request: EditRequest) -> tuple[str, str]:
        """A general question and its answer: those of the request, or of a packaged text."""
        if request.constraint_prompt is not None and request.constraint_answer is not None:
            return request.constraint_prompt, request.constraint_answer
        chance = random.Random(f"{self.settings.seed} {request.prompt} {request.target_new}")
        words = chance.choice(few_sample_texts()).split()[: sum(_WORDS)]
        room = self.base.max_tokens - 2
        while len(words) > 2 and self.base.encoder.count(" ".join(words)) > room:
            words.pop()
        given = min(_WORDS[0], len(words) - 1)
        return " ".join(words[:given]), " ".join(words[given:])

    def rows_of(self, example: EditExample) -> list[RowText]:
        """Those of the example, its prompts with the suffix, and its constraints."""
        rows = example_rows(example)
        for request in example.requests:
            prompt = self.with_suffix(request.prompt)
            rows.append(
                RowText("its prompt with suffix and target_new", prompt, request.target_new)
            )
            if request.constraint_prompt is not None:
                answer = request.constraint_answer
                rows.append(RowText("its constraint", request.constraint_prompt, answer))
        return rows

    def _encoded(self, request: EditRequest) -> list[EncodedRow]:
        """The prompt with its safe reply, and the constraint with its answer."""
        reply = self.base.encode(self.with_suffix(request.prompt), request.target_new)
        return [reply, self.base.encode(*self.constraint(request))]

    def _unsafe_reply(self, request: EditRequest) -> str | None:
        """``target_old``, or what the model says, as many tokens as the safe reply has."""
        if request.target_old is not None:
            return request.target_old
        length = self.base.encoder.count(request.target_new)
        (said,) = self.base.generate([request.prompt], max_new_tokens=length)
        return said if said.strip() else None

    def located(self, requests: Sequence[EditRequest]) -> list[int]:
        """The layer of each request: that which is set, or where its replies differ most."""
        settings, base = self.settings, self.base
        layers = sorted(self.projections)
        if settings.layer is not None or len(layers) == 1:
            return layers * len(requests)

        def row(request: EditRequest, reply: str | None) -> EncodedRow:
            if reply is not None and settings.legacy_easyedit:
                return base.encode(reply)
            return base.encode(request.prompt, reply)

        safe = [row(request, request.target_new) for request in requests]
        unsafe = [row(request, self._unsafe_reply(request)) for request in requests]
        return toxic_layers(base, safe, unsafe, layers, settings.pooling, settings.normalised)

    # ---- edits

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """Train the change of one request."""
        return self.edits_together(requests)[0]

    def together(self, requests: Sequence[EditRequest]) -> int:
        """Number of requests whose edits fit into memory together, at least 1."""
        base, size = self.base, compute_dtype(self.base.dtype).itemsize
        shapes = [projection_shape(base.module(name)) for name in self.projections.values()]
        encoded = [self._encoded(request) for request in requests]
        vocabulary = int(base.model.config.get_text_config(decoder=True).vocab_size)
        own = _COPIES * max(d_in * d_out for d_in, d_out in shapes) * size
        own += max(len(kept.answer) for _, kept in encoded) * vocabulary * size
        return requests_at_a_time(base, min(self.projections), encoded, own)

    def edits_together(self, requests: Sequence[EditRequest]) -> list[Edit]:
        """The edit of each request, as it is without the others; those of one layer in one loop."""
        by_layer: dict[int, list[int]] = {}
        for number, layer in enumerate(self.located(requests)):
            by_layer.setdefault(layer, []).append(number)
        edits: dict[int, Edit] = {}
        for layer, numbers in by_layer.items():
            edits |= zip(numbers, self._trained([requests[i] for i in numbers], layer), strict=True)
        return [edits[number] for number in range(len(requests))]

    def _trained(self, requests: Sequence[EditRequest], layer: int) -> list[Edit]:
        """The edits of requests that train the same layer."""
        base, settings, name = self.base, self.settings, self.projections[layer]
        assert settings.lr is not None  # resolved by build()
        encoded = zip(*map(self._encoded, requests), strict=True)
        passes = ConstrainedPasses.of(*(AnswerPasses(base, rows, [name]) for rows in encoded))
        start = torch.zeros(
            len(requests),
            *projection_shape(base.module(name)),
            dtype=compute_dtype(base.dtype),
            device=device_of(base.module(name)),
        )

        def losses(rows: ConstrainedPasses, tensors: list[Tensor]) -> Tensor:
            with visiting(base.model, {name: RowDelta(tensors[0])}):
                loss = settings.edit_weight * rows.losses()
                if self.constrains:
                    loss = loss + settings.constraint_weight * rows.divergences().to(loss.device)
                return loss

        loop = InnerLoop(adam(settings.lr), settings.steps, where=name)
        found = loop.run(passes, [start], losses)
        with torch.no_grad(), visiting(base.model, {name: RowDelta(found.tensors[0])}):
            diverged = passes.divergences().tolist()
        return [
            DenseEdit(
                base,
                {name: (change.t().clone(memory_format=torch.contiguous_format), None)},
                self.origin(
                    [request],
                    modules=[name],
                    layer=layer,
                    steps=len(history),
                    loss=history[-1] if history else None,
                    constraint_divergence=divergence,
                ),
            )
            for request, change, history, divergence in zip(
                requests, found.tensors[0], found.losses, diverged, strict=True
            )
        ]
