"""MEND: a hypernetwork that transforms the gradient of a request into an edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import Edit
from kedit_lightning.methods.hypernetwork.shared.editor_network import edit_from_gradient
from kedit_lightning.methods.hypernetwork.shared.hypernetwork_method import (
    HypernetworkMethod,
    HypernetworkSettings,
)
from kedit_lightning.methods.hypernetwork.shared.mend_network import (
    EditorSettings,
    MENDNetwork,
    MENDPlan,
)
from kedit_lightning.methods.hypernetwork.shared.meta_gradient import MetaGradient, meta_gradient
from kedit_lightning.methods.method import Capabilities, MethodSettings
from kedit_lightning.requests import EditBatch, EditRequest


@dataclass(frozen=True)
class MENDSettings(EditorSettings, HypernetworkSettings):
    """Settings of :class:`MEND`."""


class MEND(HypernetworkMethod):
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
        rank: Largest rank of a network's matrices. The checkpoint's, or else 1920.
        blocks: Residual blocks of a network.
        shared: One network for all projections of a shape, rather than one for each projection.
            The checkpoint's, or else true.
        normalise: Normalise the factors with running statistics. Without it, untrained networks
            give a plain step of gradient descent.
        lr: Learning rate of the networks.
        lr_lr: Learning rate of the edits' own learning rates.
        edit_lr: Initial learning rate of the edits.
        c_edit: Weight of the edit loss, the negative log-likelihood of the new answers.
        c_loc: Weight of the locality loss, the divergence on locality probes.
        accumulate: Episodes of a training step.
        legacy_sign: Add the pseudo-gradient as the released code does, so that a positive learning
            rate raises the loss until training has turned its sign.
        **settings: The settings of :class:`HypernetworkMethod`.
    """

    can: ClassVar[Capabilities] = Capabilities(encoder_decoder=True, adapter=True, weights=True)
    settings_type: ClassVar[type[MethodSettings]] = MENDSettings
    plan_type = MENDPlan
    network_type = MENDNetwork
    packaged: ClassVar[str] = "mend.ckpt"

    settings: MENDSettings
    network: MENDNetwork

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        rank: int | None = None,
        blocks: int = 2,
        shared: bool | None = None,
        normalise: bool = True,
        lr: float = 1e-6,
        lr_lr: float = 1e-4,
        edit_lr: float = 1e-4,
        c_edit: float = 0.1,
        c_loc: float = 1.0,
        accumulate: int = 10,
        legacy_sign: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, lr=lr, **settings)
        self.fit_batch_size = self.settings.n_edits * accumulate

    def plan(self, saved: Any = None) -> Any:
        """The architecture that the settings ask for; see the base class."""
        return replace(super().plan(saved), ascend=self.settings.legacy_sign)

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One gradient of the requests, transformed by the networks."""
        origin = self.prepare_edit(requests)
        return edit_from_gradient(self.base, self.network, requests, origin)

    def batch_gradients(self, batch: EditBatch) -> Iterator[MetaGradient]:
        """The meta-gradient of a batch of episodes, over all ranks."""
        weights = self.settings.c_edit, self.settings.c_loc
        episodes, at_once = self.episodes(batch), self.settings.at_once
        yield meta_gradient(self.base, self.network, episodes, weights, at_once)
