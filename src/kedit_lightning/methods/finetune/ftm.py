"""Fine-tuning of single layers on the answers of the requests (FT-M, FT-L, LocFT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec, EncodedRow, TokenRows
from kedit_lightning.base_models.layer_choice import nearest_layers
from kedit_lightning.base_models.mixture import is_mixture, picking
from kedit_lightning.base_models.taps import changing
from kedit_lightning.edits import DenseEdit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.projections import check_editable
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import Count, NotNegative, NotNegativeOrInfinite, Positive
from kedit_lightning.methods.finetune.shared.fine_tuning import fine_tune, zero_change
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.shared.losses import answer_nll
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.requests import EditRequest

Objective: TypeAlias = Literal["target_new", "prompt_last"]
#: Depth as a share of the blocks in most of EasyEdit's configurations (block 21 of 32).
USUAL_DEPTH = 0.66
#: Rows of the pass that asks which experts are picked.
ROWS_PER_PASS = 64


@dataclass(frozen=True)
class FinetuneDefaults:
    """Settings of :class:`FTM` that follow the base model."""

    layers: Sequence[int]
    steps: int = 25
    norm_constraint: float = float("inf")


@dataclass(frozen=True)
class FTMSettings(MethodSettings):
    """Settings of :class:`FTM`; ``layers``, ``steps`` and ``norm_constraint`` once it is built."""

    layers: list[int] | None
    lr: Positive
    steps: Count | None
    batch_size: Count
    norm_constraint: NotNegativeOrInfinite | None
    objective: Objective
    weight_decay: NotNegative
    stop_loss: NotNegative
    eos_in_target: bool


class FTM(EditMethod):
    """Fine-tunes the down projection of one block, or of a few, on the answers.

    FT-M is plain fine-tuning with the loss on the answer tokens alone. Many requests are trained
    together in epochs over all of them, breadth first, as in LocFT-BF. With
    ``objective: prompt_last`` and a ``norm_constraint`` it is FT-L. The weights stay as they are:
    a separate change, which starts at zero, is trained. In a block that has routed experts and
    no other MLP it trains the experts that the router picks where answers are predicted. Papers:
    https://arxiv.org/abs/2202.05262 (FT and FT-L), https://arxiv.org/abs/2401.01286 (FT-M),
    https://arxiv.org/abs/2509.22072 (LocFT-BF).

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks whose down projection is trained, negative numbers from the end. When absent
            the published ones of a known model, or else block 0.66 n of n, or the nearest one with
            a dense MLP.
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

    can: ClassVar[Capabilities] = Capabilities(weights=True)
    settings_type: ClassVar[type[MethodSettings]] = FTMSettings
    settings: FTMSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
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

    def build(self) -> None:
        """Find the projections to train, and take the settings left to the base model.

        Raises:
            UnsupportedUseError: No layer is given, or a projection cannot be edited.
            ModuleNotLocatedError: A block does not exist, or has no MLP and no routed experts.
        """
        settings, usual = self.settings, finetune_defaults(self.base)
        layers = list(usual.layers) if settings.layers is None else settings.layers
        steps = usual.steps if settings.steps is None else settings.steps
        bound = settings.norm_constraint
        bound = usual.norm_constraint if bound is None else bound
        if not layers:
            raise UnsupportedUseError("FTM: layers must name at least one block, got []")
        blocks = {b.down: b for b in map(self.base.layout.mlp_block, layers)}
        self.modules_trained = tuple(blocks)
        for module, block in blocks.items():
            if not block.is_routed:
                check_editable(self.base.model, module)
        self.settings = replace(settings, layers=layers, steps=steps, norm_constraint=bound)

    def compute_edit(self, requests: Sequence[EditRequest]) -> DenseEdit:
        """Train a change of the projections on all requests together."""
        base, settings = self.base, self.settings
        assert settings.steps is not None and settings.norm_constraint is not None  # noqa: PT018
        encoded = [base.encode(r.prompt, self._answer(r)) for r in requests]
        names = self._trained(encoded)
        changes = {n: zero_change(base.module(n), base.dtype) for n in names}
        whole = base.pad(encoded) if len(encoded) <= settings.batch_size else None

        def loss(indices: list[int]) -> Tensor:
            rows = whole if whole is not None else base.pad([encoded[i] for i in indices])
            mean = self.row_losses(rows).mean()
            return check_finite("loss", ", ".join(self.modules_trained), mean)

        tensors = [t for change in changes.values() for t in (change.dense, change.bias)]
        with changing(base.model, changes):
            history = fine_tune(
                [tensor for tensor in tensors if tensor is not None],
                len(encoded),
                loss,
                self.generator(requests, "order"),
                lr=settings.lr,
                epochs=settings.steps,
                batch_size=settings.batch_size,
                weight_decay=settings.weight_decay,
                norm_constraint=settings.norm_constraint,
                stop_loss=settings.stop_loss,
            )
        pairs = {name: (change.dense, change.bias) for name, change in changes.items()}
        notes = {"epochs": len(history), "loss": history[-1] if history else None}
        return DenseEdit(base, pairs, self.origin(requests, modules=names, **notes))

    @torch.no_grad()
    def _trained(self, encoded: Sequence[EncodedRow]) -> list[str]:
        """The projections to train: of routed experts those picked where answers are predicted."""
        experts: dict[str, None] = {}
        routed = [n for n in self.modules_trained if is_mixture(self.base.module(n))]
        for start in range(0, len(encoded) if routed else 0, ROWS_PER_PASS):
            rows = self.base.pad(encoded[start : start + ROWS_PER_PASS])
            columns = torch.where(rows.answer_mask, rows.answer_columns, rows.prompt_end[:, None])
            with picking(self.base.model, routed, columns) as picked:
                self.base.forward(rows)
            experts |= dict.fromkeys(picked)
        return [n for n in self.modules_trained if n not in routed] + sorted(experts)

    def row_losses(self, rows: TokenRows) -> Tensor:
        """Negative log-likelihood of each row's answer under the objective. Shape ``[batch]``."""
        if self.settings.objective == "target_new":
            logits = self.base.answer_logits(rows)
        else:
            logits = self.base.logits_at(rows, rows.prompt_end[:, None])
        return answer_nll(logits, rows.answer_ids, rows.answer_mask)

    def _answer(self, request: EditRequest) -> str:
        if not self.settings.eos_in_target:
            return request.target_new
        eos = self.base.tokenizer.eos_token
        if eos is None:
            raise UnsupportedUseError(
                f"eos_in_target needs an end-of-text token, and the tokenizer of "
                f"'{self.base.name}' has none; set eos_in_target to false"
            )
        return f"{request.target_new}{eos}"


def finetune_defaults(base: BaseModel) -> FinetuneDefaults:
    """Published settings of a known model, else defaults for its number of blocks."""
    blocks = len(base.layout)
    known = published_settings(base, "FTM", FinetuneDefaults)
    return known or FinetuneDefaults(
        nearest_layers(base.layout.mlp_layers, [min(round(USUAL_DEPTH * blocks), blocks - 1)])
    )
