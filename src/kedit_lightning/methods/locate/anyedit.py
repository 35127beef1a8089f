"""Closed-form editing of long answers, window by window (AnyEdit, arXiv 2502.05628)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import LowRankDelta
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import Count, Need
from kedit_lightning.methods.locate.shared import least_squares
from kedit_lightning.methods.locate.shared.answer_windows import (
    AnswerWindows,
    WindowStates,
    window_states,
)
from kedit_lightning.methods.locate.shared.closed_form import ClosedForm
from kedit_lightning.methods.locate.shared.closed_form_settings import LayersSettings
from kedit_lightning.methods.locate.shared.subject_states import Carried, SubjectStates
from kedit_lightning.methods.locate.shared.value_targets import NormAnchor
from kedit_lightning.methods.locate.shared.window_values import WindowValues
from kedit_lightning.requests import EditRequest


@dataclass(frozen=True)
class AnyEditSettings(LayersSettings):
    """Settings of :class:`AnyEdit`."""

    window: Count
    keep_others: bool
    eos_in_target: bool


class AnyEdit(ClosedForm):
    """MEMIT for answers of any length, such as passages; requests need no subject.

    The answer is cut into windows. A change of the hidden state of the token before each window is
    optimised to make the window follow, one window after another, with the changes before earlier
    ones in force. All of them are then written in one solve, which keeps the outputs at the other
    tokens of the prompt and the answer. As published, values are found without texts before
    prompts and without a divergence, so ``contexts``, ``kl_factor``, ``consistency``, ``aligned``
    and other ``targets`` are refused. A long answer is only as good as its worst token: where it
    does not follow, lower ``preserve`` or ``window``. Paper: https://arxiv.org/abs/2502.05628.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks whose MLPs are edited.
        window: Tokens of a window; the paper has 40 for Llama 3 and 50 for Qwen 2.5. Small models
            hold fewer in one hidden state.
        keep_others: Keep the outputs at the other tokens of the prompt and the answer.
        eos_in_target: Write the end-of-text token after each answer, against run-on answers.
        contexts: None.
        stop_loss: The optimisation of a value ends once its loss is below this.
        **settings: Those of all closed-form methods.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    settings_type = AnyEditSettings
    settings: AnyEditSettings
    published = "AnyEdit"

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        window: int = 40,
        keep_others: bool = True,
        eos_in_target: bool = True,
        contexts: int = 0,
        stop_loss: float = 0.01,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, contexts=contexts, stop_loss=stop_loss, **settings)

    def build(self) -> None:
        """Resolve settings, and refuse those that have no part in it.

        Raises:
            UnsupportedUseError: One of them is given.
        """
        given = self.settings
        refused = {
            "contexts": given.contexts > 0,
            "kl_factor": bool(given.kl_factor),
            "consistency": given.consistency > 0,
            "aligned": given.aligned,
            "targets": given.targets != "last",
        }
        if any(refused.values()):
            names = ", ".join(name for name, is_given in refused.items() if is_given)
            raise UnsupportedUseError(
                f"AnyEdit finds values before the windows of an answer alone, without {names}; "
                "leave it out, or use MEMIT"
            )
        super().build()
        self.locate = replace(self.locate, kl_factor=0.0)
        self.settings = replace(self.settings, kl_factor=0.0)

    def answers(self, requests: Sequence[EditRequest]) -> list[AnswerWindows]:
        """The answers of requests, cut into windows."""
        size, ended = self.settings.window, self.settings.eos_in_target
        return [AnswerWindows.of(self.base, request, size, ended) for request in requests]

    def places(self, requests: Sequence[EditRequest]) -> int:
        """Number of windows."""
        return sum(map(len, self.answers(requests)))

    def layer_values(self, requests: Sequence[EditRequest]) -> WindowValues:
        """Values before windows at the edited layers, optimised when first needed."""
        sites = {layer: self.site(layer) for layer in self.layers}
        anchor = NormAnchor(self._memories()) if self.settings.norm_anchor else None
        answers = self.answers(requests)
        return WindowValues(
            self.base, requests, sites, (), self.locate, anchor=anchor, answers=answers
        )

    def _states(
        self, modules: Sequence[str], requests: Sequence[EditRequest], carried: Carried = None
    ) -> SubjectStates:
        return window_states(self.base, modules, self.answers(requests), carried)

    def update(
        self, module: str, states: SubjectStates, residuals: Tensor, prior: least_squares.Prior
    ) -> LowRankDelta:
        """The change that maps keys before windows to their values, and keeps other outputs."""
        assert isinstance(states, WindowStates)
        if self.settings.keep_others:
            others = torch.cat(list(states.others[module])).double()
            prior = least_squares.with_history(prior, others.T)
        return super().update(module, states, residuals, prior)
