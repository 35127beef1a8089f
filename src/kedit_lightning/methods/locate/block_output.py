"""Editing of a whole block for unstructured knowledge (UnKE, arXiv 2405.15349)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec, EncodedRow
from kedit_lightning.base_models.continuation import can_resume, run_below
from kedit_lightning.base_models.layer_choice import nearest_layers
from kedit_lightning.base_models.rows import TokenRows
from kedit_lightning.base_models.taps import capture, changing, skipping, stop_after
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.edits import DenseEdit, Edit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.projections import check_editable, projections_in
from kedit_lightning.methods.capabilities import (
    Capabilities,
    Count,
    CountOrZero,
    Need,
    NotNegative,
    Positive,
)
from kedit_lightning.methods.locate.shared.answer_windows import AnswerWindows
from kedit_lightning.methods.locate.shared.closed_form_settings import LocateSettings
from kedit_lightning.methods.locate.shared.value_site import Site
from kedit_lightning.methods.locate.shared.window_values import WindowValues
from kedit_lightning.methods.method import EditMethod, MethodSettings
from kedit_lightning.methods.shared.inner_loop import adam, descend, zero_change
from kedit_lightning.methods.shared.losses import check_reached
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.requests import EditRequest
from kedit_lightning.statistics import few_sample_texts

#: Depth of the block as a share of all (block 7 of 32).
DEPTH = 0.22
#: Rows of a forward pass, and tokens of a text whose outputs are kept.
ROWS_PER_PASS, TEXT_TOKENS = 16, 64


@dataclass(frozen=True)
class BlockSettings:
    """Settings that follow the base model."""

    layer: int
    lr: float = 2e-4
    clamp: float = 4.0


@dataclass(frozen=True)
class UnKESettings(MethodSettings):
    """Settings of :class:`UnKE`."""

    layer: int | None
    window: Count | None
    steps: Count
    lr: Positive | None
    texts: CountOrZero
    value_steps: Count
    value_lr: Positive
    value_decay: NotNegative
    clamp: Positive | None
    stop_loss: NotNegative
    eos_in_target: bool


class UnKE(EditMethod):
    """Trains all projections of one block so that its output brings a long answer about.

    First the change of the block's output at the last token of the prompt is optimised that makes
    the whole answer follow. Then all matrices of the block, those of attention too, are trained to
    give this output there, and the outputs that they gave before at the tokens in front and on
    plain texts. With ``window`` the answer is cut, as AnyEdit does, and the outputs before all
    windows are trained. Against the released code norms are not trained, weights do not decay
    while they are, and padding does not count. Paper: https://arxiv.org/abs/2405.15349.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layer: Block that is trained; when absent the published one of a known model, or else
            block 0.22 n of n, or the nearest one with a dense MLP.
        window: Tokens of a window of the answer, which is one when absent.
        steps: Steps of training the block.
        lr: Learning rate of Adam for the block; 2e-4 when absent, unless published otherwise.
        texts: Plain texts on which the block's outputs are kept.
        value_steps: Passes of the optimisation of an output.
        value_lr: Learning rate of the optimisation of an output.
        value_decay: Weight of the size of the change of an output.
        clamp: Largest change of an output, relative to its size; 4 when absent.
        stop_loss: The optimisation of an output ends once its loss is below this.
        eos_in_target: Write the end-of-text token after each answer, against run-on answers.
        seed: Unused: nothing is random.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    can: ClassVar[Capabilities] = Capabilities(weights=True, images=True)
    settings_type: ClassVar[type[MethodSettings]] = UnKESettings
    settings: UnKESettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layer: int | None = None,
        window: int | None = None,
        steps: int = 50,
        lr: float | None = None,
        texts: int = 20,
        value_steps: int = 50,
        value_lr: float = 0.5,
        value_decay: float = 1e-3,
        clamp: float | None = None,
        stop_loss: float = 0.01,
        eos_in_target: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the block and its projections, and take the settings left to the base model.

        Raises:
            ModuleNotLocatedError: The block does not exist.
            UnsupportedUseError: A projection cannot be edited.
        """
        base, settings, layout = self.base, self.settings, self.base.layout
        usual = published_settings(base, "UnKE", BlockSettings)
        wished = [round(DEPTH * len(layout))]
        usual = usual or BlockSettings(nearest_layers(layout.mlp_layers, wished)[0])
        layer = usual.layer if settings.layer is None else settings.layer
        if not -len(layout) <= layer < len(layout):
            layout.block(layer)  # refuses it
        self.layer = layer % len(layout)
        self.block = layout.block_name(self.layer)
        names = [f"{self.block}.{name}" for name in projections_in(base.module(self.block))]
        self.modules_trained = tuple(names)
        for name in self.modules_trained:
            check_editable(base.model, name)
        self.settings = replace(
            settings,
            layer=self.layer,
            lr=settings.lr or usual.lr,
            clamp=settings.clamp or usual.clamp,
        )

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """Find outputs before answers, and train the block to give them."""
        settings, base = self.settings, self.base
        assert settings.lr is not None
        answers = [self.answer(request) for request in requests]
        values = self.values(answers)
        batches = self._batches(answers, values)
        changes = {n: zero_change(base.module(n), base.dtype) for n in self.modules_trained}
        tensors = [t for change in changes.values() for t in (change.dense, change.bias)]
        trained = [tensor for tensor in tensors if tensor is not None]
        optimizer, losses = adam(settings.lr)(trained), list[float]()
        for _ in range(settings.steps):
            total, gradients = 0.0, [torch.zeros_like(tensor) for tensor in trained]
            with changing(base.model, changes):
                for batch in batches:
                    loss = batch.loss(self)
                    check_reached(loss)
                    total += float(check_finite("loss", self.block, loss.detach()))
                    parts = torch.autograd.grad(loss, trained, allow_unused=True)
                    for gradient, part in zip(gradients, parts, strict=True):
                        if part is not None:
                            gradient += part
            descend(optimizer, trained, gradients)
            losses.append(total)
        pairs = {name: (change.dense, change.bias) for name, change in changes.items()}
        notes = {"modules": list(changes), "loss": losses[-1]}
        return DenseEdit(base, pairs, self.origin(requests, **notes))

    def answer(self, request: EditRequest) -> AnswerWindows:
        """The answer of a request, cut into windows."""
        settings = self.settings
        return AnswerWindows.of(self.base, request, settings.window, settings.eos_in_target)

    def values(self, answers: Sequence[AnswerWindows]) -> Tensor:
        """Outputs of the block before windows that bring them about. ``[windows, hidden]``."""
        settings = self.settings
        assert settings.clamp is not None
        locate = LocateSettings(
            steps=settings.value_steps,
            lr=settings.value_lr,
            clamp=settings.clamp,
            weight_decay=settings.value_decay,
            stop_loss=settings.stop_loss,
        )
        site = Site((self.block,), self.layer, inside=False)
        requests = [answer.request for answer in answers]
        values = WindowValues(self.base, requests, {self.layer: site}, (), locate, answers=answers)
        return values.values(self.layer)

    def _batches(self, answers: Sequence[AnswerWindows], values: Tensor) -> list[_Outputs]:
        """Wanted outputs of the rows of answers, up to their last window, and of texts."""
        pairs = []
        for answer in answers:
            ids = (*answer.row.prompt, *answer.row.answer)[: answer.places[-1] + 1]
            row = replace(answer.row, answer=ids[len(answer.row.prompt) :])
            pairs.append((row, answer.places))
        rows = [row for row, _ in pairs]
        wanted = self._outputs(rows, [places for _, places in pairs], values)
        texts = [self.base.encoder.text(text) for text in few_sample_texts()[: self.settings.texts]]
        kept = [replace(row, prompt=row.prompt[: self._text_tokens]) for row in texts]
        return wanted + self._outputs(kept, [[] for _ in kept], values[:0])

    @property
    def _text_tokens(self) -> int:
        return min(TEXT_TOKENS, self.base.max_tokens)

    @torch.no_grad()
    def _outputs(
        self, rows: Sequence[EncodedRow], places: Sequence[Sequence[int]], values: Tensor
    ) -> list[_Outputs]:
        """Present outputs of the block on rows, with values in their places.

        All tokens of all rows have the same weight, and their mean square is 1 part of the loss.
        """
        tokens, batches, start = sum(len(r.prompt) + len(r.answer) for r in rows), [], 0
        for part in chunks(list(zip(rows, places, strict=True)), ROWS_PER_PASS):
            own = self._shown([row for row, _ in part])
            wanted = self.outputs(own).clone()
            for number, (_, at) in enumerate(part):
                wanted[number, list(at)] = values[start : start + len(at)].to(wanted)
                start += len(at)
            batches.append(_Outputs(own, wanted, tokens))
        return batches

    def _shown(self, rows: Sequence[EncodedRow]) -> _Batch:
        """Rows, and what the blocks below give for them, which no step changes."""
        base, batch = self.base, self.base.pad(rows, "right")
        below = {}
        if can_resume(base):
            below = run_below(base, self.layer, (), lambda: base.forward(batch))
        return _Batch(batch, below)

    def outputs(self, batch: _Batch) -> Tensor:
        """Outputs of the block. Shape ``[rows, tokens, hidden]``."""
        model = self.base.model
        with (
            skipping(model, batch.below),
            capture(model, [self.block]) as seen,
            stop_after(model, self.block),
        ):
            self.base.forward(batch.rows)
        return seen.outputs[self.block]


class _Batch(NamedTuple):
    """Padded rows, and the outputs of blocks below the edited one, by name."""

    rows: TokenRows
    below: Mapping[str, Any]


@dataclass(frozen=True)
class _Outputs:
    """Rows with the outputs that the block is to give; ``tokens`` is their number in all rows."""

    batch: _Batch
    wanted: Tensor
    tokens: int

    def loss(self, method: UnKE) -> Tensor:
        """Squared error summed over the rows, over the number of entries of all. A scalar."""
        present = method.outputs(self.batch)
        error = (present - self.wanted).to(torch.promote_types(present.dtype, torch.float32))
        at = self.batch.rows.attention_mask.bool().to(error.device)
        return error[at].square().sum() / (self.tokens * error.shape[-1])
