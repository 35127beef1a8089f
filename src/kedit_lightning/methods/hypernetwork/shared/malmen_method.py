"""The base of the methods that train MALMEN's networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.blocks import Block
from kedit_lightning.edits import Edit
from kedit_lightning.edits.kept_equations import keeps_equations
from kedit_lightning.methods.hypernetwork.shared.parameter_shift import compute_shift_edit
from kedit_lightning.methods.hypernetwork.shared.value_networks import (
    MALMENMethodSettings,
    Projections,
    ShiftSize,
    Tokens,
    ValueNetworks,
)
from kedit_lightning.methods.training.trained_method import TrainedMethod
from kedit_lightning.requests import EditRequest


class MALMENMethod(TrainedMethod):
    """What MALMEN and RLEdit share; both also derive from ``HypernetworkMethod``.

    Args:
        base_model: The model to edit.
        projections: The edited MLP projections of a block: ``down``, the one that writes into the
            residual stream, ``up``, those that read it, or ``all``. The checkpoint's, or else
            ``down`` of MALMEN and ``up`` of RLEdit.
        tokens: Tokens of a request that give keys: those that predict its ``answer``, or ``all``.
            The checkpoint's, or else ``answer``.
        shift_size: What ``ridge`` penalises: the squared ``norm`` of a shift, as published, or its
            mean squared effect on the ``keys`` of the fit's requests and probes, with which later
            edits disturb earlier ones less. Text behind an answer gives no keys, so with large
            edits check that free answers still end well. Both are the same before a fit. The
            checkpoint's, or else ``norm``.
        rank: Largest rank of a network's matrices. The checkpoint's, or else 1920 (RLEdit: 1024).
        blocks: Residual blocks of each network. The checkpoint's, or else 2 (RLEdit: 4).
        shared: One network for all projections of the same shape, rather than one each. The
            checkpoint's, or else true.
        normalise: Normalise the factors with running statistics.
        lr_lr: Learning rate of the logarithms of ``edit_lr`` and ``ridge``.
        edit_lr: Initial learning rate of the value differences, one number a projection.
        ridge: Initial weight of the penalty of a shift, one number a projection.
        c_edit: Weight of the edit loss.
        c_loc: Weight of the locality loss.
        clip: Largest norm of the gradient of a training step.
        **settings: The settings of ``HypernetworkMethod``.
    """

    learns: ClassVar[str] = "a hypernetwork that turns gradients into wanted changes of outputs"
    #: The edited projections of a block unless settings say otherwise.
    default_projections: ClassVar[Projections]
    network_type = ValueNetworks

    settings: MALMENMethodSettings
    network: ValueNetworks

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        projections: Projections | None = None,
        tokens: Tokens | None = None,
        shift_size: ShiftSize | None = None,
        rank: int | None = None,
        blocks: int | None = None,
        shared: bool | None = None,
        normalise: bool = True,
        lr_lr: float = 1e-3,
        edit_lr: float = 1e-6,
        ridge: float = 1.0,
        c_edit: float = 1.0,
        c_loc: float = 1.0,
        clip: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, clip=clip, **settings)

    @property
    def chooses_projections(self) -> bool:
        """Whether the settings choose projections of a block, and override a checkpoint's."""
        return self.settings.projections is not None

    def projections_of(self, block: Block) -> Sequence[str]:
        """Names of the edited projections of a block."""
        projections = self.settings.projections or self.default_projections
        if projections == "all":
            return block.projections
        down = projections == "down"
        return [name for name in block.projections if (name == block.down) == down]

    def together(self, requests: Sequence[EditRequest]) -> int:
        """One request at a time: the shift of an edit is solved from all its gradients."""
        return 1

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One ridge regression of all requests for each projection. Statistics do not change.

        Raises:
            NonFiniteError: Factors of a projection are NaN, or its ridge has vanished.
            TemporaryFileError: There is no space for rows that wait for the solve.
        """
        origin, at_once = self.prepare_edit(requests), self.settings.at_once
        edit = compute_shift_edit(self.base, self.network, requests, at_once, origin)
        # Value differences are counted from what the model gives, whatever stands below.
        edit.equations = {} if keeps_equations() else None
        return edit
