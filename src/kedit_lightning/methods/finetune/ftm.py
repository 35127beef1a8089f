"""Fine-tuning of single layers on the answers of the requests (FT-M, FT-L, LocFT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec, TokenRows
from kedit_lightning.edits import DenseEdit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.projections import check_editable
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.finetune.shared.descent import (
    Recipe,
    attached,
    descend,
    tensors_of,
    zero_change,
)
from kedit_lightning.methods.finetune.shared.finetune_defaults import settings_for
from kedit_lightning.methods.method import Capabilities, EditMethod
from kedit_lightning.methods.shared.losses import answer_nll
from kedit_lightning.requests import EditRequest


class FTM(EditMethod):
    """Fine-tunes the down projection of one block, or of a few, on the answers.

    FT-M is plain fine-tuning with the loss on the answer's tokens alone. Given many requests at
    once it trains in ordinary epochs over all of them, breadth first, as LocFT-BF does. With
    ``objective: prompt_last`` and a ``norm_constraint`` it is FT-L. The weights are not written to:
    what is trained is a change of its own that starts at zero. Papers:
    https://arxiv.org/abs/2202.05262 (FT and FT-L), https://arxiv.org/abs/2401.01286 (FT-M),
    https://arxiv.org/abs/2509.22072 (LocFT-BF).

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks whose down projection is trained, negative numbers from the end. When absent
            the published ones of a known model, or else block 0.66 n of n.
        lr: Step size of Adam.
        steps: Most passes over the requests; 25 when absent, unless published otherwise.
        batch_size: Requests that a step looks at, where there are several: 1 as in EasyEdit, about
            64 in LocFT-BF, for thousands of requests. Few requests in large batches get too few
            steps.
        norm_constraint: Largest change of any entry of the weights (FT-L). When absent the
            published one of a known model, or else none; ``inf`` switches it off.
        objective: ``target_new`` predicts each token of the answer from what stands before it;
            ``prompt_last`` predicts all of them from the last token of the prompt, as the released
            code of FT-L does, which is right for answers of one token only.
        weight_decay: Pulls the change towards zero; added to its gradient.
        stop_loss: A batch whose loss is below it is skipped, and training ends once the mean over
            all requests is.
        eos_in_target: Train the end-of-text token behind each answer, against run-on answers.
        seed: Start of all random choices; together with the requests it fixes them.
    """

    can: ClassVar[Capabilities] = Capabilities(weights=True)

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        lr: float = 5e-4,
        steps: int | None = None,
        batch_size: int = 1,
        norm_constraint: float | None = None,
        objective: Literal["target_new", "prompt_last"] = "target_new",
        weight_decay: float = 0.0,
        stop_loss: float = 1e-2,
        eos_in_target: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base_model, seed)
        self.layers = layers
        self.lr = lr
        self.steps = steps
        self.batch_size = batch_size
        self.norm_constraint = norm_constraint
        self.objective = objective
        self.weight_decay = weight_decay
        self.stop_loss = stop_loss
        self.eos_in_target = eos_in_target
        self.modules_trained: tuple[str, ...] = ()

    def build(self) -> None:
        """Find the projections to train, and settle what was left to the base model."""
        self._check_settings()
        usual = settings_for(self.base)
        layers = usual.layers if self.layers is None else self.layers
        names = dict.fromkeys(self.base.layout.block(layer).down for layer in layers)
        for name in names:
            check_editable(self.base.model, name)
        self.modules_trained = tuple(names)
        box = usual.norm_constraint if self.norm_constraint is None else self.norm_constraint
        self.recipe = Recipe(
            lr=self.lr,
            epochs=usual.steps if self.steps is None else self.steps,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            box=box,
            stop_loss=self.stop_loss,
        )

    def _check_settings(self) -> None:
        for name, value, least in (
            ("layers", None if self.layers is None else len(self.layers), 1),
            ("batch_size", self.batch_size, 1),
            ("steps", self.steps, 1),
            ("norm_constraint", self.norm_constraint, 0),
        ):
            if value is not None and value < least:
                what = "name at least one block" if name == "layers" else f"be at least {least}"
                raise UnsupportedUseError(f"FTM: {name} must {what}, got {getattr(self, name)}")

    def compute_edit(self, requests: Sequence[EditRequest]) -> DenseEdit:
        """Train a change of the projections on all requests together."""
        base = self.base
        encoded = [base.encode(r.prompt, self._answer(r)) for r in requests]
        changes = {n: zero_change(base.module(n), base.dtype) for n in self.modules_trained}
        whole = base.pad(encoded) if len(encoded) <= self.recipe.batch_size else None

        def loss_of(indices: list[int]) -> Tensor:
            rows = whole if whole is not None else base.pad([encoded[i] for i in indices])
            loss = self.row_losses(rows).mean()
            return check_finite("loss", ", ".join(self.modules_trained), loss)

        with attached(base.model, changes):
            history = descend(
                tensors_of(changes),
                len(encoded),
                loss_of,
                self.recipe,
                self.generator(requests, "order"),
            )
        pairs = {name: (change.dense, change.bias) for name, change in changes.items()}
        notes = {
            "modules": self.modules_trained,
            "epochs": len(history),
            "loss": history[-1] if history else None,
        }
        return DenseEdit(base, pairs, self.origin(requests, **notes))

    def row_losses(self, rows: TokenRows) -> Tensor:
        """Loss of each row under the objective. Shape ``[batch]``."""
        if self.objective == "target_new":
            logits = self.base.answer_logits(rows)
        else:
            logits = self.base.logits_at(rows, rows.prompt_end[:, None])
        return answer_nll(logits, rows.answer_ids, rows.answer_mask)

    def _answer(self, request: EditRequest) -> str:
        if not self.eos_in_target:
            return request.target_new
        eos = self.base.tokenizer.eos_token
        if eos is None:
            raise UnsupportedUseError(
                f"eos_in_target needs an end-of-text token, and the tokenizer of "
                f"'{self.base.name}' has none; set eos_in_target to false"
            )
        return f"{request.target_new}{eos}"
