"""Rank-one model editing (Meng et al. 2022) and its symmetric variant (Gupta et al. 2024)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import LowRankDelta
from kedit_lightning.methods.locate.shared.closed_form import ClosedForm
from kedit_lightning.methods.locate.shared.closed_form_settings import LayerSettings
from kedit_lightning.methods.locate.shared.equations import Equation
from kedit_lightning.methods.locate.shared.least_squares import Prior, rank_one_update
from kedit_lightning.methods.locate.shared.subject_states import SubjectStates
from kedit_lightning.methods.method import Capabilities


class ROME(ClosedForm):
    """Rank-one model editing: one MLP layer maps the subject's key to a value for the new answer.

    Settings left at ``None`` follow the base model: published ones where it is known, else a rule.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layer: Block whose MLP is edited.
        contexts: Number of texts put before the prompt while the value is optimised.
        **settings: Those of all closed-form methods.
    """

    settings_type = LayerSettings
    settings: LayerSettings
    can = Capabilities(batch=False, adapter=True, weights=True, images=True)
    published = "ROME"
    site_of_values = "mlp"
    context_lengths = (5, 10)
    #: Whether the mean key over contexts is used throughout, rather than the bare prompt's key.
    mean_key: ClassVar[bool] = False

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layer: int | None = None,
        contexts: int = 20,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, contexts=contexts, **settings)

    def mean_keys(self, inputs: Tensor) -> Tensor:
        """Plain mean over contexts, ``[n, d_in]`` from ``[n, contexts, d_in]``."""
        return inputs.double().mean(1)

    def equation(self, module: str, states: SubjectStates, residuals: Tensor) -> Equation:
        """The mean key, the key whose value is wanted, and by how much it misses it."""
        keys, outputs = states.inputs[module].double(), states.outputs[module].double()
        if not self.mean_key:
            return Equation(keys.mean(1), keys[:, 0], residuals)
        mean = keys.mean(1)
        return Equation(mean, mean, residuals + outputs[:, 0] - outputs.mean(1))

    def solution(self, module: str, equation: Equation, prior: Prior) -> LowRankDelta:
        """The rank-one change for one request."""
        mean, key, residual = (part[0] for part in equation)
        return rank_one_update(key, residual, mean, prior, module)


class RROME(ROME):
    """ROME with the mean key over contexts throughout, which keeps updates bounded.

    Takes the settings of ``ROME``.
    """

    mean_key: ClassVar[bool] = True
