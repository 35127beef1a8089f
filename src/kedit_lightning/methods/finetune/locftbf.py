"""Breadth-first fine-tuning of one place, in one go or over a stream (LocFT-BF)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.layer_choice import nearest_layers
from kedit_lightning.contradictions import settle
from kedit_lightning.methods.capabilities import CountOrZero
from kedit_lightning.methods.finetune.shared.fine_tuning_method import (
    FinetuneDefaults,
    FineTuningMethod,
    FineTuningSettings,
)
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.requests import EditRequest

#: Twice as many as answers without their end of text take.
_EPOCHS = 50


@dataclass(frozen=True)
class LocFTBFSettings(FineTuningSettings):
    """Settings of :class:`LocFTBF`."""

    replay: CountOrZero


class LocFTBF(FineTuningMethod):
    """Fine-tunes one late projection in ordinary epochs over all facts, breadth first.

    Editing by fine-tuning is usually run depth first: all steps on one fact, then on the next,
    which forgets the first. Here epochs of mini-batches run over all facts of an edit, with their
    end of text, and without a bound on the change. In a stream of edits each epoch also draws facts
    that the edits on the stack have written, so that what came before is rehearsed; rolling an edit
    back takes its facts out of the buffer. Paper: https://arxiv.org/abs/2509.22072, which trains
    all facts at once; the buffer is ours.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks that are trained, negative numbers from the end; when absent the last but
            one, or the nearest one with a dense MLP.
        modules: Projections of each of them, by their names inside the block, such as
            ``mlp.up_proj``; the down projection of its MLP when absent.
        lr: Learning rate of Adam.
        steps: Maximum number of epochs over the requests; 50 when absent.
        batch_size: Requests of an optimizer step; the paper takes about 64 for thousands of facts.
        replay: Earlier facts that each epoch of a later edit draws from the buffer; 0 for none.
        norm_constraint: Largest change of any entry of the weights; none when absent.
        weight_decay: L2 penalty on the change.
        stop_loss: A batch with a lower loss is skipped, and training ends once the mean loss of an
            epoch is lower.
        eos_in_target: Train the end-of-text token after each answer, against run-on answers.
        seed: Seed of the order of requests, which depends on the requests too.
    """

    settings_type: ClassVar[type[MethodSettings]] = LocFTBFSettings
    settings: LocFTBFSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        modules: list[str] | None = None,
        lr: float = 5e-4,
        steps: int | None = None,
        batch_size: int = 8,
        replay: int = 100,
        norm_constraint: float | None = None,
        weight_decay: float = 0.0,
        stop_loss: float = 1e-2,
        eos_in_target: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def usual(self) -> FinetuneDefaults:
        """Settings for the base model where none are given."""
        layout, dense = self.base.layout, self.settings.modules is None
        known = layout.mlp_layers if dense else range(len(layout))
        return FinetuneDefaults(nearest_layers(known, [max(0, len(layout) - 2)]), _EPOCHS)

    @property
    def replay(self) -> int:
        """Earlier facts that each epoch draws."""
        return self.settings.replay

    def earlier(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """Facts of the edits on the stack that still hold once the requests are written."""
        parts = [part for edit in self.base.edits for part in edit.parts()]
        names = type(self).__name__
        written = [r for part in parts if part.origin.method == names for r in part.origin.requests]
        count = len(requests)
        kept = settle([*dict.fromkeys(written), *requests], "last") if written else [*requests]
        return [request for request in kept[: len(kept) - count] if request not in requests]
