"""The value that makes the model give the new answer (ROME's ``v*``), for many requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, TokenRows
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.base_models.taps import add_at, capture, change_output, stop_after
from kedit_lightning.edits.base import check_finite
from kedit_lightning.edits.modules import compute_dtype
from kedit_lightning.methods.losses import mean_nll
from kedit_lightning.requests import EditRequest


@dataclass(frozen=True)
class TargetSettings:
    """How values are optimised.

    Args:
        lr: Learning rate of Adam.
        steps: Passes; the last one only measures, so there are ``steps - 1`` updates.
        weight_decay: Weight of ``‖δ‖ / ‖z‖²``.
        clamp: Largest ``‖δ‖ / ‖z‖``.
        kl_factor: Weight of the divergence from the unedited answer to "{subject} is a".
        stop_loss: A request is finished once its loss is below this.
    """

    lr: float = 0.5
    steps: int = 25
    weight_decay: float = 1e-3
    clamp: float = 4.0
    kl_factor: float = 0.0625
    stop_loss: float = 0.05


@dataclass(frozen=True)
class KeyReading:
    """What the edited layer sees and returns at the subject's last token.

    Args:
        keys: Input under each context, the bare prompt first. Shape ``[contexts, d_in]``.
        outputs: Output under each context. Shape ``[contexts, d_out]``.
    """

    keys: Tensor
    outputs: Tensor


@torch.no_grad()
def read_keys(
    base: BaseModel, module: str, requests: Sequence[EditRequest], contexts: Sequence[str]
) -> list[KeyReading]:
    """Keys and outputs of a layer for each request under each context, the bare prompt first."""
    prefixes = ("", *contexts)
    prompts = [prefix + request.prompt for request in requests for prefix in prefixes]
    subjects = [request.subject for request in requests for _ in prefixes]
    rows = base.rows(prompts, subjects=subjects)
    with capture(base.model, [module]) as seen, stop_after(base.model, module):
        base.forward(rows)
    at = (torch.arange(len(rows), device=base.device), rows.subject_end)
    keys = seen.inputs[module][at].split(len(prefixes))
    outputs = seen.outputs[module][at].split(len(prefixes))
    return [KeyReading(k, y) for k, y in zip(keys, outputs, strict=True)]


def divergence(current: Tensor, initial: Tensor) -> Tensor:
    """``KL(current ‖ initial)`` of log-probabilities. ``[rows]`` from ``[rows, vocab]``."""
    return (current.exp() * (current - initial)).sum(-1)


@dataclass
class _Adam:
    """Adam with a state and a step count of its own for each row."""

    lr: float
    mean: Tensor
    square: Tensor
    steps: int = 0

    def step(self, value: Tensor, gradient: Tensor, active: Tensor) -> Tensor:
        """Update the active rows of ``value``, ``[n, d]``; they have all made the same steps."""
        self.steps += 1
        self.mean = torch.where(active, 0.9 * self.mean + 0.1 * gradient, self.mean)
        self.square = torch.where(active, 0.999 * self.square + 0.001 * gradient**2, self.square)
        mean = self.mean / (1 - 0.9**self.steps)
        square = self.square / (1 - 0.999**self.steps)
        return torch.where(active, value - self.lr * mean / (square.sqrt() + 1e-8), value)


class TargetOptimizer:
    """Finds what must be added to a layer's output at the subject for the new answer to follow.

    Requests are independent: their losses are summed, each has an Adam state of its own, and those
    that are finished drop out, so the result is that of one at a time.

    Args:
        base: The base model, as its stack stands.
        module: The projection whose output is changed.
        contexts: Texts put before each prompt, besides none.
        settings: How values are optimised.
    """

    def __init__(
        self, base: BaseModel, module: str, contexts: Sequence[str], settings: TargetSettings
    ) -> None:
        self.base = base
        self.module = module
        self.prefixes = ("", *contexts)
        self.settings = settings

    def run(self, requests: Sequence[EditRequest], initial: Tensor) -> Tensor:
        """Optimise.

        Args:
            requests: What to write; each has a subject.
            initial: Output of the layer for the bare prompts, ``z``. Shape ``[n, d_out]``.

        Returns:
            ``δ``, what must be added. Shape ``[n, d_out]``, at least float32.

        Raises:
            NonFiniteError: The loss of a request became NaN or infinite.
        """
        dtype = compute_dtype(initial.dtype)
        initial = initial.to(dtype)
        size = initial.norm(dim=1)
        delta = torch.zeros_like(initial)
        adam = _Adam(self.settings.lr, torch.zeros_like(delta), torch.zeros_like(delta))
        encoded = [self._encode(request) for request in requests]
        active = list(range(len(requests)))
        rows, owner = self._stack(encoded, active)
        reference = self._essence(rows, owner, torch.zeros_like(delta)).detach()
        for step in range(self.settings.steps):
            leaf = delta.clone().requires_grad_(True)
            loss = self._losses(rows, owner, leaf, reference, size)
            measured = loss.detach()
            for index in active:
                check_finite(
                    f"target loss of {requests[index].label}", self.module, measured[index]
                )
            left = [i for i in active if float(measured[i]) >= self.settings.stop_loss]
            if step == self.settings.steps - 1 or not left:
                break
            (gradient,) = torch.autograd.grad(loss[left].sum(), leaf)
            if left != active:
                active = left
                rows, owner = self._stack(encoded, active)
            chosen = torch.zeros(len(delta), 1, dtype=torch.bool, device=delta.device)
            chosen[active] = True
            delta = self._project(adam.step(delta, gradient, chosen), size)
        return delta

    def _project(self, delta: Tensor, size: Tensor) -> Tensor:
        """Pull ``δ`` back into the ball of radius ``clamp · ‖z‖``."""
        limit = self.settings.clamp * size
        shrink: Tensor = (limit / delta.norm(dim=1).clamp(min=1e-30)).clamp(max=1)
        return delta * shrink[:, None]

    # ---- rows: for each request its contexts with the answer, then "{subject} is a"

    def _encode(self, request: EditRequest) -> list[EncodedRow]:
        assert request.subject is not None
        encode = self.base.encode
        rows = [
            encode(p + request.prompt, request.target_new, request.subject) for p in self.prefixes
        ]
        return [*rows, encode(f"{request.subject} is a", None, request.subject)]

    def _stack(
        self, encoded: list[list[EncodedRow]], active: list[int]
    ) -> tuple[TokenRows, Tensor]:
        rows = [row for index in active for row in encoded[index]]
        owner = [index for index in active for _ in encoded[index]]
        return self.base.pad(rows), torch.tensor(owner, device=self.base.device)

    def _log_probs(self, rows: TokenRows, owner: Tensor, delta: Tensor) -> Tensor:
        """Log-probabilities at answer columns and subject. ``[rows, width + 1, vocab]``."""
        columns = torch.cat([rows.answer_columns, rows.subject_end[:, None]], dim=1)
        added = delta[owner]
        with change_output(
            self.base.model, self.module, lambda y: add_at(y, rows.subject_end, added)
        ):
            logits = self.base.logits_at(rows, columns)
        return logits.to(delta.dtype).log_softmax(-1)

    def _per_request(self, values: Tensor, owner: Tensor, count: int) -> Tensor:
        return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(
            0, owner, values
        )

    def _essence(self, rows: TokenRows, owner: Tensor, delta: Tensor) -> Tensor:
        """Log-probabilities after the subject in "{subject} is a", by request. ``[n, vocab]``."""
        with torch.no_grad():
            logs = self._log_probs(rows, owner, delta)
        return logs[~rows.answer_mask.any(1), -1]

    def _losses(
        self, rows: TokenRows, owner: Tensor, delta: Tensor, reference: Tensor, size: Tensor
    ) -> Tensor:
        """Loss of each request, 0 for those that are finished. Shape ``[n]``."""
        logs = self._log_probs(rows, owner, delta)
        answers = rows.answer_mask.any(1)
        ids = rows.answer_ids[..., None]
        chosen = logs[:, :-1].gather(-1, ids)[..., 0]
        nll = mean_nll(chosen[answers], rows.answer_mask[answers])
        count = len(delta)
        loss = self._per_request(nll, owner[answers], count) / len(self.prefixes)
        kept = owner[~answers]
        kl = divergence(logs[~answers, -1], reference[kept])
        loss = loss + self.settings.kl_factor * self._per_request(kl, kept, count)
        decay = self.settings.weight_decay * delta[kept].norm(dim=1) / size[kept] ** 2
        return loss + self._per_request(decay, kept, count)
