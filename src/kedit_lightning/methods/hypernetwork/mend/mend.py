"""MEND: a hypernetwork that transforms the gradient of a request into an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.methods.hypernetwork.shared.hypernetwork_method import (
    HypernetworkMethod,
    HypernetworkSettings,
)
from kedit_lightning.methods.hypernetwork.shared.mend_network import (
    MENDMethod,
    MENDMethodSettings,
    MENDPlan,
)
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.methods.shared.fact_template import conditioned
from kedit_lightning.methods.shared.row_lengths import RowText, request_rows
from kedit_lightning.methods.training.episodes import Episode
from kedit_lightning.requests import EditBatch, EditExample, EditRequest


@dataclass(frozen=True)
class MENDSettings(MENDMethodSettings, HypernetworkSettings):
    """Settings of :class:`MEND`."""

    condition: str | None


class MEND(MENDMethod, HypernetworkMethod):
    """MEND, from "Fast Model Editing at Scale" (Mitchell et al. 2022).

    ``fit`` trains small networks that transform the gradient of a request, decomposed into the
    inputs and the output gradients of each edited projection, to the rank-one factors of an edit.
    The outer loss is the likelihood of the new answer to rephrases, and the divergence of answers
    to unrelated questions (locality probes). An edit then costs one forward and one backward pass.

    Differences from the released code: the edit descends (a positive learning rate lowers the
    loss); the two learning rates belong to two groups of one Adam, where the released code steps
    the edits' learning rates with both of its optimizers; a step takes ``accumulate`` episodes in
    one pass, each row of the batch carrying its own edit, which gives the same gradient; the loss
    of several requests is the sum over requests of the mean over answer tokens.

    By default the MLP projections of the last three blocks are edited; of an encoder-decoder, those
    of the last two blocks of each half.

    Args:
        base_model: The model to edit.
        condition: Text before the prompt of each request whose gradient is taken, in which
            ``{subject}`` and ``{task}`` stand for those of the request; probes carry none. That of
            the checkpoint, or else none.
        **settings: The settings of the base classes.
    """

    settings_type: ClassVar[type[MethodSettings]] = MENDSettings
    plan_type = MENDPlan
    packaged: ClassVar[str] = "mend.ckpt"

    settings: MENDSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        condition: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, **settings)

    def rows_of(self, example: EditExample) -> list[RowText]:
        """Also its requests as their gradients are taken."""
        rows, condition = super().rows_of(example), self.settings.condition
        if condition is not None:
            for request in example.requests:
                rows += request_rows(conditioned(request, condition))
        return rows

    def asked(self, requests: Sequence[EditRequest]) -> Sequence[EditRequest]:
        """The requests behind their condition."""
        return [conditioned(request, self.settings.condition) for request in requests]

    def episodes(self, batch: EditBatch) -> list[Episode]:
        """The episodes of a batch, with requests behind their condition."""
        found = super().episodes(batch)
        return [replace(one, requests=tuple(self.asked(one.requests))) for one in found]
