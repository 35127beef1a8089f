"""Sequential editing under a bound on what plain text may lose (LyapLock, arXiv 2505.15702)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.mixture import is_mixture
from kedit_lightning.edits import LowRankDelta
from kedit_lightning.edits.effects import AddToOutput, Effect
from kedit_lightning.edits.projections import compute_dtype, projection_shape
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import Positive
from kedit_lightning.methods.locate.shared import least_squares
from kedit_lightning.methods.locate.shared.closed_form import ClosedForm
from kedit_lightning.methods.locate.shared.closed_form_settings import LayersSettings
from kedit_lightning.methods.locate.shared.edit_groups import EditGroups, remembered_keys
from kedit_lightning.methods.locate.shared.subject_states import SubjectStates
from kedit_lightning.methods.locate.shared.value_targets import NormAnchor

#: A change that lies in the span of the whitened keys but for this share is kept in its factors.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class LyapLockSettings(LayersSettings):
    """Settings of :class:`LyapLock`."""

    budget: Positive


def next_queue(queue: float, drift: float, first: float, budget: float) -> float:
    """Weight of keeping plain text after an edit, from the one before it.

    The virtual queue of the paper, ``Z ← max(Z + a (L − α L₁), Z₀)`` with ``a = 1 / Z₀`` and
    ``Z₀ = √(α L₁)``, counted in ``Z₀``.

    Args:
        queue: ``a Z`` of that edit; 1 at first.
        drift: ``L``, what plain text has lost under all edits so far.
        first: ``L₁``, the same under the first edit.
        budget: ``α``, how many times the first loss is allowed.
    """
    return max(queue + drift / max(budget * first, 1e-30) - 1, 1.0)


def joint_update(
    keys: Tensor, wanted: Tensor, change: Tensor, prior: least_squares.Prior
) -> LowRankDelta:
    """``Δ`` that takes a change to the one that serves all keys, new and old, at the least cost.

    ``D + Δ`` minimises ``tr((D + Δ) G (D + Δ)ᵀ) + ‖(D + Δ) K − V‖²``: what counts is the distance
    from the weights before all edits of the sequence, not from those of now.

    Args:
        keys: ``K``, those of earlier edits and of this. Shape ``[d_in, n]``.
        wanted: ``V``, by how much outputs there shall differ from those before all of these edits.
            Shape ``[d_out, n]``.
        change: ``D``, the change of all earlier edits. Shape ``[d_out, d_in]``.
        prior: Gives ``G⁻¹ K``.
    """
    joint = least_squares.ridge_update(keys, wanted, prior, eps=1.0)
    if not bool(change.any()):
        return joint
    delta, d_out = joint.dense - change, len(change)
    if keys.shape[1] < d_out:
        basis = torch.linalg.qr(joint.a.T).Q
        inside = delta @ basis
        if float((delta - inside @ basis.T).norm()) <= _ROUNDING * float(delta.norm()):
            return LowRankDelta(basis.T, inside)
    return LowRankDelta(delta, torch.eye(d_out).to(delta))


class LyapLock(ClosedForm):
    """MEMIT for long sequences, which bounds what plain text loses by a Lyapunov queue.

    Each edit solves for the keys of all edits of the sequence so far, from the weights before them:
    outputs at earlier keys stay what they were made, and the distance from the unedited weights is
    the cost. Its weight is a queue: it grows with each edit after which the loss of plain text
    stands above ``budget`` times that of the first edit, and falls again below. The first edit is
    that of MEMIT. Edits of other methods on the stack count as part of the unedited weights. The
    paper has a weight of 1000 keys (``preserve``). Paper: https://arxiv.org/abs/2505.15702.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks whose MLPs are edited.
        budget: What plain text may lose, in what it has lost after the first edit (``α``).
        history: On; without it the method is MEMIT.
        **settings: Those of all closed-form methods.
    """

    settings_type = LyapLockSettings
    settings: LyapLockSettings
    published = "MEMIT"
    keeps_history: ClassVar[bool] = True

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        budget: float = 60.0,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, **settings)

    def build(self) -> None:
        """Resolve settings.

        Raises:
            UnsupportedUseError: The history is switched off, or an edited MLP is one of experts.
        """
        super().build()
        if not self.settings.history:
            raise UnsupportedUseError(
                "LyapLock solves for the keys of earlier edits too; leave history out, or use MEMIT"
            )
        routed = [name for name in self.edited if is_mixture(self.base.module(name))]
        if routed:
            raise UnsupportedUseError(
                f"LyapLock weighs the change of one matrix, and the experts in '{routed[0]}' have "
                "one each; use MEMIT"
            )

    def update(
        self, module: str, states: SubjectStates, residuals: Tensor, prior: least_squares.Prior
    ) -> LowRankDelta:
        """The change that maps keys to values, and takes earlier keys back to theirs."""
        keys, change = self.mean_keys(states.inputs[module]).T, self.change(module)
        wanted = residuals.T + change @ keys
        past = self._memories()
        known = remembered_keys(self.base, past, module)
        if known is not None:
            values = [m[f"{module}.values"].to(wanted) for m in past if f"{module}.values" in m]
            keys, wanted = torch.cat([known, keys], 1), torch.cat([*values, wanted], 1)
        cost = least_squares.weighted_prior(prior, self.queue(module))
        return joint_update(keys, wanted, change, cost)

    def change(self, module: str) -> Tensor:
        """What the edits of this method on the stack add to a module. Float64, dense."""
        weight, base = self.base.module(module), self.base
        total = torch.zeros(projection_shape(weight)[::-1], dtype=torch.float64).to(base.device)
        for edit in base.edits:
            for part in edit.parts():
                if part.origin.method == type(self).__name__:
                    total += added(part.effects(), module, total)
        return total

    def queue(self, module: str) -> float:
        """Weight of keeping plain text, in its first."""
        past = [m[f"{module}.queue"] for m in self._memories() if f"{module}.queue" in m]
        if not past:
            return 1.0
        queue, drift = past[-1].tolist()
        return next_queue(queue, drift, float(past[0][1]), self.settings.budget)

    def _history(self, module: str) -> Tensor | None:
        return None  # earlier keys are solved for with those of the edit

    def _remember(self, batch: EditGroups, anchor: NormAnchor | None) -> None:
        super()._remember(batch, anchor)
        for module in self.edited:
            before, queue = self.change(module), self.queue(module)
            moment = self.covariances.second_moment(module).to(before)
            for changes, memory in zip(batch.changes, batch.memories, strict=True):
                change = before + added([AddToOutput(module, changes[module])], module, before)
                keys = memory[f"{module}.keys"]
                memory[f"{module}.values"] = (change @ keys.to(change)).to(keys).contiguous()
                drift = float(((change @ moment) * change).sum())
                kept = compute_dtype(self.base.dtype)
                memory[f"{module}.queue"] = torch.tensor([queue, drift], dtype=kept)


def added(effects: Sequence[Effect], module: str, like: Tensor) -> Tensor:
    """What effects add to the weight of a module. Shape ``[d_out, d_in]``."""
    total = torch.zeros_like(like)
    for effect in effects:
        if isinstance(effect, AddToOutput) and effect.module == module:
            change = effect.delta.matrix(like)
            total = total if change is None else total + change
    return total
