"""Values before the windows of long answers, found one window after another (AnyEdit)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.continuation import Continuation
from kedit_lightning.base_models.taps import visiting
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.locate.shared.answer_windows import AnswerWindows, window_states
from kedit_lightning.methods.locate.shared.closed_form_settings import LocateSettings
from kedit_lightning.methods.locate.shared.subject_states import Carried
from kedit_lightning.methods.locate.shared.value_optimizer import (
    Adam,
    EarlyStopping,
    shortened,
)
from kedit_lightning.methods.locate.shared.value_site import Site
from kedit_lightning.methods.locate.shared.value_targets import LastLayerValues
from kedit_lightning.methods.shared.losses import check_reached
from kedit_lightning.methods.shared.row_memory import requests_at_a_time


class _WindowPass:
    """Rows up to one window, in one padded batch, with the changes before earlier windows."""

    def __init__(
        self, base: BaseModel, site: Site, answers: Sequence[AnswerWindows], earlier: Tensor
    ) -> None:
        number = earlier.shape[1]
        rows = [answer.up_to(number) for answer in answers]
        self._site, self._model, self._size = site, base.model, answers[0].size
        self._number = number
        self._place(Continuation(base, rows, site.resumes_at, cuts=[0] * len(rows)), earlier)

    def _place(self, passes: Continuation, earlier: Tensor) -> None:
        self._passes, self._earlier, rows = passes, earlier, passes.rows
        first = self._number * self._size
        # The token before a window predicts its first token.
        self._columns = rows.answer_columns[:, : first + 1 : self._size]
        self._window, slot = rows.answer_mask[:, first:].nonzero(as_tuple=True)
        self._ids = rows.answer_ids[self._window, first + slot]
        self._places = self._window, rows.answer_columns[self._window, first + slot]
        self._share = 1 / rows.answer_mask[:, first:].sum(1)[self._window]

    def keep(self, kept: list[int]) -> None:
        """Drop the rows of finished windows; numbers are those of the last call."""
        if len(kept) < len(self._earlier):
            index = torch.tensor(kept, device=self._earlier.device)
            self._place(self._passes.select(index), self._earlier[index])

    def run(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood of windows, and whether all their tokens are the likeliest.

        ``[n]`` each, with changes ``[n, hidden]`` before them in force.
        """
        changes = torch.cat([self._earlier, delta[:, None]], dim=1)
        rows = torch.arange(len(delta), device=delta.device)[:, None]

        def add(x: Tensor, y: Tensor) -> Tensor:
            at = (rows.to(y.device), self._columns.to(y.device))
            return y + torch.zeros_like(y).index_put(at, changes.to(y))

        with visiting(self._model, {self._site.modules[-1]: add}):
            logits = self._passes.logits_of(self._places)
        logs = logits.to(delta.dtype).log_softmax(-1)
        chosen = logs.gather(-1, self._ids[:, None])[:, 0]
        zero = torch.zeros(len(delta), dtype=delta.dtype, device=delta.device)
        missed = (logs.detach().argmax(-1) != self._ids).to(delta.dtype)
        nll = zero.index_add(0, self._window, -chosen * self._share)
        return nll, zero.index_add(0, self._window, missed) == 0


def optimise_window(
    base: BaseModel,
    site: Site,
    settings: LocateSettings,
    answers: Sequence[AnswerWindows],
    initial: Tensor,
    earlier: Tensor,
) -> Tensor:
    """Changes of the outputs before one window of each answer, that make the window follow.

    Answers are independent of each other, and those that are finished drop out.

    Args:
        base: The base model, as its stack stands.
        site: Where values are outputs.
        settings: How values are optimised.
        answers: The answers; each has the window.
        initial: Outputs before the window, ``z``. Shape ``[n, d_out]``.
        earlier: Changes before the windows in front of it. Shape ``[n, windows, d_out]``.

    Returns:
        ``δ``. Shape ``[n, d_out]``.

    Raises:
        NonFiniteError: The loss of a window became NaN or infinite.
    """
    number = earlier.shape[1]
    encoded = [[answer.up_to(number)] for answer in answers]
    size = requests_at_a_time(base, site.resumes_at, encoded)
    done = []
    for start in range(0, len(answers), size):
        part = slice(start, start + size)
        forward = _WindowPass(base, site, answers[part], earlier[part])
        done.append(_optimise(forward, settings, answers[part], initial[part], site.modules[-1]))
    return torch.cat(done)


def _optimise(
    forward: _WindowPass,
    settings: LocateSettings,
    answers: Sequence[AnswerWindows],
    initial: Tensor,
    module: str,
) -> Tensor:
    size, delta = initial.norm(dim=1), torch.zeros_like(initial)
    adam = Adam(settings.lr, torch.zeros_like(delta), torch.zeros_like(delta))
    stopping = EarlyStopping(settings, size)
    active = list(range(len(answers)))
    for step in range(settings.steps):
        leaf = delta.clone().requires_grad_(True)
        nll, likeliest = forward.run(leaf[active])
        check_reached(nll)
        loss = nll + settings.weight_decay * (leaf.norm(dim=1) / size**2)[active]
        if not bool(torch.isfinite(loss).all()):  # one transfer from the device
            for index, value in zip(active, loss.detach(), strict=True):
                check_finite(f"target loss of {answers[index].request.label}", module, value)
        ended = stopping.finished(loss.detach(), torch.zeros_like(nll), likeliest, active)
        kept = [i for i, finished in enumerate(ended.tolist()) if not finished]
        if step == settings.steps - 1 or not kept:
            break
        (gradient,) = torch.autograd.grad(loss[kept].sum(), leaf)
        active = [active[i] for i in kept]
        forward.keep(kept)
        is_active = torch.zeros(len(delta), 1, dtype=torch.bool, device=delta.device)
        is_active[active] = True
        delta = shortened(adam.step(delta, gradient, is_active), settings.clamp * size)
    return delta


@dataclass
class WindowValues(LastLayerValues):
    """Values at the last layer, before each window of each answer; see :class:`LastLayerValues`.

    The change before a window is found with those before earlier windows in force.

    Args:
        answers: The answers of the requests, cut into windows.
    """

    answers: Sequence[AnswerWindows] = ()

    def _optimised(self, layer: int) -> Tensor:
        site = self.site(layer)
        initial = self._outputs(site)
        start = initial.to(compute_dtype(self.base.dtype))
        ends = torch.tensor([len(answer) for answer in self.answers]).cumsum(0).tolist()
        first = [end - len(answer) for end, answer in zip(ends, self.answers, strict=True)]
        delta = torch.zeros_like(start)
        for number in range(max(map(len, self.answers))):
            has = [i for i, answer in enumerate(self.answers) if number < len(answer)]
            own = torch.tensor([first[i] for i in has], device=start.device)
            before = own[:, None] + torch.arange(number, device=start.device)
            answers = [self.answers[i] for i in has]
            delta[own + number] = optimise_window(
                self.base, site, self.settings, answers, start[own + number], delta[before]
            )
        values = initial + delta.double()
        return values if self.anchor is None else self.anchor.scale(values, site.modules[-1])

    def _outputs(self, site: Site, carried: Carried = None) -> Tensor:
        module = site.modules[-1]
        return (
            window_states(self.base, [module], self.answers, carried).outputs[module][:, 0].double()
        )
