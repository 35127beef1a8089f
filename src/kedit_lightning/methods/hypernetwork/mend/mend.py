"""MEND: a hypernetwork that transforms the gradient of a request into an edit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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


@dataclass(frozen=True)
class MENDSettings(MENDMethodSettings, HypernetworkSettings):
    """Settings of :class:`MEND`."""


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
    """

    settings_type: ClassVar[type[MethodSettings]] = MENDSettings
    plan_type = MENDPlan
    packaged: ClassVar[str] = "mend.ckpt"

    settings: MENDSettings
