"""What methods that fine-tune projections of some blocks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.layer_choice import nearest_layers
from kedit_lightning.base_models.mixture import is_mixture, picking
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.base_models.taps import changing, visiting
from kedit_lightning.edits import DenseEdit, Edit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.projections import (
    check_editable,
    compute_dtype,
    find_module,
    projection_shape,
)
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import Count, NotNegative, NotNegativeOrInfinite, Positive
from kedit_lightning.methods.finetune.shared.fine_tuning import (
    clamped,
    fine_tune,
)
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.shared.answer_passes import AnswerPasses, Objective
from kedit_lightning.methods.shared.inner_loop import InnerLoop, adam, zero_change
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.methods.shared.row_delta import RowDelta
from kedit_lightning.methods.shared.row_memory import requests_at_a_time
from kedit_lightning.requests import EditRequest

#: Depth as a share of the blocks in most of EasyEdit's configurations (block 21 of 32).
USUAL_DEPTH = 0.66
#: Copies of a change while it is trained: itself, its gradient, Adam's two moments, its results.
_COPIES = 6
#: Rows of the pass that asks which experts are picked.
ROWS_PER_PASS = 64


@dataclass(frozen=True)
class FinetuneDefaults:
    """Settings of fine-tuning that follow the base model."""

    layers: Sequence[int]
    steps: int = 25
    norm_constraint: float = float("inf")


@dataclass(frozen=True)
class FineTuningSettings(MethodSettings):
    """What fine-tuning methods have in common; what was left open is there once it is built."""

    layers: list[int] | None
    modules: list[str] | None
    lr: Positive
    steps: Count | None
    batch_size: Count
    norm_constraint: NotNegativeOrInfinite | None
    weight_decay: NotNegative
    stop_loss: NotNegative
    eos_in_target: bool


class FineTuningMethod(EditMethod):
    """Trains a change of projections of some blocks, which starts at zero, on the answers.

    The weights stay as they are.  What lies below the projections is computed once.  Several facts
    of one edit are trained in epochs over all of them; edits of one fact each are trained together,
    row by row, with the results of each alone.  In a block that has routed experts and no other
    MLP, the experts are trained that the router picks where answers are predicted.
    """

    can: ClassVar[Capabilities] = Capabilities(weights=True, images=True)
    settings: FineTuningSettings
    #: Table of published settings.
    published: ClassVar[str] = "FTM"

    @property
    def replay(self) -> int:
        """Earlier facts that each epoch draws from the buffer."""
        return 0

    def earlier(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The buffer: facts that are written already, and trained again beside the requests."""
        return []

    def usual(self) -> FinetuneDefaults:
        """Settings for the base model where none are given."""
        chosen, layout = self.settings.modules, self.base.layout
        layers = None if chosen is None else range(len(layout))
        return finetune_defaults(self.base, layers, self.published)

    def projected(self, module: str, gradient: Tensor) -> Tensor:
        """The gradient of a change, of a weight or a bias, as the optimizer gets it."""
        return gradient

    @property
    def objective(self) -> Objective:
        """Where answer tokens are predicted."""
        return "target_new"

    def build(self) -> None:
        """Find the projections to train, and take the settings left to the base model.

        Raises:
            UnsupportedUseError: No layer is given, or a projection cannot be edited.
            ModuleNotLocatedError: A block does not exist, or has no MLP and no routed experts.
        """
        settings, usual = self.settings, self.usual()
        layers = list(usual.layers) if settings.layers is None else settings.layers
        steps = usual.steps if settings.steps is None else settings.steps
        bound = settings.norm_constraint
        bound = usual.norm_constraint if bound is None else bound
        for name, given in (("layers", layers), ("modules", settings.modules)):
            if given == []:
                one = "block" if name == "layers" else "projection"
                raise UnsupportedUseError(
                    f"{type(self).__name__}: {name} must name at least one {one}, got []"
                )
        modules = [name for layer in layers for name in self._projections(layer)]
        self.modules_trained = tuple(dict.fromkeys(modules))
        for module in self.modules_trained:
            if not is_mixture(find_module(self.base.model, module)):
                check_editable(self.base.model, module)
        self.settings = replace(settings, layers=layers, steps=steps, norm_constraint=bound)

    def _projections(self, layer: int) -> list[str]:
        if self.settings.modules is None:
            return [self.base.layout.mlp_block(layer).down]
        layout, count = self.base.layout, len(self.base.layout)
        if not -count <= layer < count:
            layout.block(layer)  # refuses it
        block = layout.block_name(layer % count)
        return [f"{block}.{name}" for name in self.settings.modules]

    # ---- one edit of several facts

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """Train a change of the projections on all requests together."""
        earlier = self.earlier(requests) if self.replay else []
        if len(requests) == 1 and self.trains_rows and not earlier:
            return self.edits_together(requests)[0]
        base, settings = self.base, self.settings
        assert settings.steps is not None and settings.norm_constraint is not None  # noqa: PT018
        encoded = [self._encode(request) for request in [*requests, *earlier]]
        names = self._trained(encoded)
        changes = {n: zero_change(base.module(n), base.dtype) for n in names}
        passes = self._kept_passes(encoded)

        def loss(indices: list[int]) -> Tensor:
            if passes is None:
                own = self._passes([encoded[i] for i in indices])
            elif len(indices) < len(passes):
                own = passes.select(torch.tensor(indices, device=base.device))
            else:
                own = passes
            mean = own.losses(self.objective).mean()
            return check_finite("loss", ", ".join(self.modules_trained), mean)

        parts = [(n, t) for n, c in changes.items() for t in (c.dense, c.bias) if t is not None]

        def project(gradients: Sequence[Tensor]) -> list[Tensor]:
            return [self.projected(n, g) for (n, _), g in zip(parts, gradients, strict=True)]

        with changing(base.model, changes):
            history = fine_tune(
                [tensor for _, tensor in parts],
                len(requests),
                loss,
                self.generator(requests, "order"),
                lr=settings.lr,
                epochs=settings.steps,
                batch_size=settings.batch_size,
                weight_decay=settings.weight_decay,
                norm_constraint=settings.norm_constraint,
                stop_loss=settings.stop_loss,
                buffer=len(earlier),
                replay=self.replay,
                project=project,
            )
        pairs = {name: (change.dense, change.bias) for name, change in changes.items()}
        return self._edit(requests, pairs, history)

    def _kept_passes(self, encoded: Sequence[EncodedRow]) -> AnswerPasses | None:
        """Passes of all rows, with what lies below the projections; ``None`` where it is much."""
        fits = len(encoded) <= requests_at_a_time(self.base, 0, [[row] for row in encoded])
        return self._passes(encoded) if fits else None

    # ---- edits of one fact each

    @property
    def trains_rows(self) -> bool:
        """Whether rows of one pass can train changes of their own; not those of routed experts."""
        return not self._routed

    def together(self, requests: Sequence[EditRequest]) -> int:
        """Number of requests whose edits fit into memory together, at least 1."""
        if not self.trains_rows or (self.replay and self.earlier(requests)):
            return 1
        shapes = [projection_shape(self.base.module(name)) for name in self.modules_trained]
        entries = sum((d_in + 1) * d_out for d_in, d_out in shapes)
        own = _COPIES * entries * compute_dtype(self.base.dtype).itemsize
        first = self.base.layout.first_block(self.modules_trained)
        encoded = [[self._encode(request)] for request in requests]
        return requests_at_a_time(self.base, first, encoded, own)

    def edits_together(self, requests: Sequence[EditRequest]) -> list[Edit]:
        """The edit of each request, as it is without the others."""
        settings, names = self.settings, self.modules_trained
        assert settings.steps is not None and settings.norm_constraint is not None  # noqa: PT018
        changes = [zero_change(self.base.module(name), self.base.dtype) for name in names]
        start = [t.t() for change in changes for t in (change.dense, change.bias) if t is not None]
        loop = InnerLoop(
            adam(settings.lr, settings.weight_decay),
            settings.steps,
            settings.stop_loss,
            partial(clamped, bound=settings.norm_constraint),
            ", ".join(names),
        )

        def by_module(tensors: Sequence[Tensor]) -> dict[str, Any]:
            rest = iter(tensors)
            return {
                name: (next(rest), None if change.bias is None else next(rest))
                for name, change in zip(names, changes, strict=True)
            }

        def losses(passes: AnswerPasses, tensors: list[Tensor]) -> Tensor:
            deltas = {name: RowDelta(*own) for name, own in by_module(tensors).items()}
            with visiting(self.base.model, deltas):
                return passes.losses(self.objective)

        count = len(requests)
        found = loop.run(
            self._passes([self._encode(request) for request in requests]),
            [tensor.detach().expand(count, *tensor.shape) for tensor in start],
            losses,
        )
        own = torch.contiguous_format  # an edit does not keep those of the others alive
        return [
            self._edit(
                [request],
                by_module([t[i].t().clone(memory_format=own) for t in found.tensors]),
                history,
            )
            for i, (request, history) in enumerate(zip(requests, found.losses, strict=True))
        ]

    # ---- parts of both

    @property
    def _routed(self) -> list[str]:
        return [n for n in self.modules_trained if is_mixture(self.base.module(n))]

    @torch.no_grad()
    def _trained(self, encoded: Sequence[EncodedRow]) -> list[str]:
        """The projections to train: of routed experts those picked where answers are predicted."""
        experts: dict[str, None] = {}
        routed = self._routed
        for start in range(0, len(encoded) if routed else 0, ROWS_PER_PASS):
            rows = self.base.pad(encoded[start : start + ROWS_PER_PASS])
            columns = torch.where(rows.answer_mask, rows.answer_columns, rows.prompt_end[:, None])
            with picking(self.base.model, routed, columns) as picked:
                self.base.forward(rows)
            experts |= dict.fromkeys(picked)
        return [n for n in self.modules_trained if n not in routed] + sorted(experts)

    def _passes(self, encoded: Sequence[EncodedRow]) -> AnswerPasses:
        return AnswerPasses(self.base, encoded, self.modules_trained)

    def _edit(
        self,
        requests: Sequence[EditRequest],
        changes: dict[str, tuple[Tensor | None, Tensor | None]],
        history: Sequence[float],
    ) -> DenseEdit:
        notes = {"epochs": len(history), "loss": history[-1] if history else None}
        origin = self.origin(requests, modules=list(changes), **notes)
        return DenseEdit(self.base, changes, origin)

    def _encode(self, request: EditRequest) -> EncodedRow:
        answer = request.target_new
        if self.settings.eos_in_target:
            eos = self.base.tokenizer.eos_token
            if eos is None:
                raise UnsupportedUseError(
                    f"eos_in_target needs an end-of-text token, and the tokenizer of "
                    f"'{self.base.name}' has none; set eos_in_target to false"
                )
            answer = f"{answer}{eos}"
        return self.base.encode(request.prompt, answer, image=request.image)


def finetune_defaults(
    base: BaseModel, layers: Sequence[int] | None = None, table: str = "FTM"
) -> FinetuneDefaults:
    """Published settings of a known model, else defaults for its number of blocks.

    Args:
        base: The base model.
        layers: The blocks to choose from; by default those with an MLP.
        table: Table of published settings.
    """
    blocks = len(base.layout)
    known = published_settings(base, table, FinetuneDefaults)
    if known is not None:
        return known
    wished = min(round(USUAL_DEPTH * blocks), blocks - 1)
    return FinetuneDefaults(nearest_layers(layers or base.layout.mlp_layers, [wished]))
