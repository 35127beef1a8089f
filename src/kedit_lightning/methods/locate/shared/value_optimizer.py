"""Target optimisation: values that make the model give new answers (ROME's ``v*``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.continuation import Continuation
from kedit_lightning.base_models.head_cache import common_beginnings
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.base_models.taps import add_at, capture, visiting
from kedit_lightning.chat_turns import put_before
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.locate.shared.alignment import ALIGNED_TOGETHER, Alignment
from kedit_lightning.methods.locate.shared.closed_form_settings import LocateSettings
from kedit_lightning.methods.locate.shared.subject_states import up_to_subject
from kedit_lightning.methods.locate.shared.value_site import Site
from kedit_lightning.methods.shared.contexts import contexts_of
from kedit_lightning.methods.shared.losses import check_reached
from kedit_lightning.methods.shared.row_groups import request_groups
from kedit_lightning.requests import EditRequest

#: PMET: once the new answer is the likeliest, its loss counts this much, ...
RELAXED_WEIGHT = 0.1
#: ... and the optimisation ends when the divergence term is this small.
RELAXED_DIVERGENCE = 0.01


def divergence(current: Tensor, initial: Tensor) -> Tensor:
    """``KL(current ‖ initial)`` of log-probabilities. ``[rows]`` from ``[rows, vocab]``."""
    return (current.exp() * (current - initial)).sum(-1)


def context_distance(hidden: Tensor, counts: Tensor) -> Tensor:
    """``Σ_{i<j} ‖h_i − h_j‖²`` over contexts (CORE), of which each stands there ``counts`` times.

    ``[n]`` from ``[n, contexts, hidden]`` and ``[contexts]``.
    """
    weighted = hidden * counts[:, None]
    return counts.sum() * (weighted * hidden).sum((1, 2)) - weighted.sum(1).square().sum(1)


def shortened(vectors: Tensor, limit: Tensor) -> Tensor:
    """Pull vectors of ``[..., d]`` back into balls of radius ``limit``, of shape ``[...]``."""
    shrink: Tensor = (limit / vectors.norm(dim=-1).clamp(min=1e-30)).clamp(max=1)
    return vectors * shrink[..., None]


@dataclass
class Adam:
    """Adam with a state and a step count of its own for each row."""

    lr: float
    mean: Tensor
    square: Tensor
    steps: int = 0

    def step(self, value: Tensor, gradient: Tensor, active: Tensor) -> Tensor:
        """Update the active rows of ``value``; they have all made the same number of steps."""
        self.steps += 1
        self.mean = torch.where(active, 0.9 * self.mean + 0.1 * gradient, self.mean)
        self.square = torch.where(active, 0.999 * self.square + 0.001 * gradient**2, self.square)
        mean = self.mean / (1 - 0.9**self.steps)
        square = self.square / (1 - 0.999**self.steps)
        return torch.where(active, value - self.lr * mean / (square.sqrt() + 1e-8), value)


class _PassResult(NamedTuple):
    """Result of a forward pass, by request: ``[n]`` each, and ``[n, vocab]``."""

    nll: Tensor  # mean negative log-likelihood of the answer over contexts
    likeliest: Tensor  # whether the answer is the likeliest under every context
    distance: Tensor  # mean distance of contexts in later blocks
    essence: Tensor  # log-probabilities after "{subject} is a"


class _ForwardPass:
    """The rows of some requests in one padded batch: contexts with the answer, "{subject} is a".

    Each context has one row, which counts as often as the context is given.
    """

    def __init__(
        self,
        base: BaseModel,
        site: Site,
        encoded: Sequence[list[EncodedRow]],
        counts: Sequence[int],
        monitor: bool,
    ) -> None:
        later = range(site.resumes_at, len(base.layout)) if monitor else ()
        site = site.behind_block(base)
        self.base, self.site, self.contexts = base, site, len(counts)
        self._counts = torch.tensor(counts, device=base.device)
        self.monitored = [base.layout.block_name(block) for block in later]
        rows = [row for request in encoded for row in request]
        shared = common_beginnings(encoded) if len(encoded) > 1 else None
        self._place(Continuation(base, rows, site.resumes_at, shared=shared), len(encoded))

    def _place(self, passes: Continuation, count: int) -> None:
        self.passes, self.count = passes, count
        rows = passes.rows
        number = torch.arange(len(rows), device=rows.subject_end.device)
        self._request = number // (self.contexts + 1)
        self._is_essence = number % (self.contexts + 1) == self.contexts
        row, slot = rows.answer_mask.nonzero(as_tuple=True)
        self._answer_request, self._answer_ids = self._request[row], rows.answer_ids[row, slot]
        counts = self._counts[number[row] % (self.contexts + 1)]
        self._share = counts / (rows.answer_mask.sum(1)[row] * self._counts.sum())
        essence = number[self._is_essence]
        self._places = (
            torch.cat([row, essence]),
            torch.cat([rows.answer_columns[row, slot], rows.subject_end[essence]]),
        )

    def keep(self, kept: list[int]) -> None:
        """Drop the rows of finished requests; numbers are those of the last call."""
        if len(kept) == self.count:
            return
        each = self.contexts + 1
        index = torch.tensor([i * each + j for i in kept for j in range(each)])
        self._place(self.passes.select(index.to(self.base.device)), len(kept))

    def run(self, delta: Tensor) -> _PassResult:
        """Run with a change of ``[n, sites, hidden]`` in force."""
        change = self.site.gain * delta[self._request]
        columns = self.passes.rows.subject_end
        visits = {
            name: lambda x, y, i=i: add_at(y, columns, change[:, i])
            for i, name in enumerate(self.site.modules)
        }
        with visiting(self.base.model, visits), capture(self.base.model, self.monitored) as seen:
            logits = self.passes.logits_of(self._places)
        logs = logits.to(delta.dtype).log_softmax(-1)
        answers, essence = logs.split([len(self._answer_ids), self.count])
        log_probs = answers.gather(-1, self._answer_ids[:, None])[:, 0]
        missed = (answers.detach().argmax(-1) != self._answer_ids).to(delta.dtype)
        zero = torch.zeros(self.count, dtype=delta.dtype, device=delta.device)
        return _PassResult(
            nll=zero.index_add(0, self._answer_request, -log_probs * self._share),
            essence=essence,
            likeliest=zero.index_add(0, self._answer_request, missed) == 0,
            distance=self._distance([seen.outputs[name] for name in self.monitored], zero),
        )

    def _distance(self, outputs: list[Tensor], zero: Tensor) -> Tensor:
        """Distance of contexts at the subject, by request, averaged over blocks and width."""
        for output in outputs:
            rows = torch.arange(len(output), device=output.device)
            hidden = output[rows, self.passes.rows.subject_end][~self._is_essence].to(zero)
            hidden = hidden.reshape(self.count, self.contexts, -1)
            zero = zero + context_distance(hidden, self._counts) / (len(outputs) * hidden.shape[-1])
        return zero


class EarlyStopping:
    """When requests are finished: by loss, by patience (MPES) or by divergence (PMET)."""

    def __init__(self, settings: LocateSettings, like: Tensor) -> None:
        self._settings = settings
        #: Weight of the loss of each answer. Shape ``[n]``.
        self.weight = torch.ones_like(like)
        self._since = torch.full_like(like, -1)

    def finished(self, loss: Tensor, kl: Tensor, likeliest: Tensor, at: list[int]) -> Tensor:
        """Which of the requests numbered ``at`` are finished; all of shape ``[len(at)]``."""
        settings = self._settings
        done = loss < settings.stop_loss
        if settings.patience is not None:
            self._since[at] += ((self._since[at] >= 0) | likeliest).to(self._since.dtype)
            done = done | (self._since[at] >= settings.patience)
        if settings.relaxed:
            done = done | (likeliest & (kl <= RELAXED_DIVERGENCE))
            self.weight[at] = torch.where(likeliest, RELAXED_WEIGHT, 1.0).to(self.weight.dtype)
        return done


@dataclass(frozen=True)
class ValueOptimizer:
    """Optimises the change of outputs at the subject that makes the new answers follow.

    Requests are independent: their losses are summed, each has an Adam state of its own, and those
    that are finished drop out, so the result is that of one at a time.  Only the blocks above the
    site run, from cached hidden states, on the tokens from the subject's last one on.
    """

    base: BaseModel
    site: Site
    contexts: Sequence[str]
    settings: LocateSettings

    def run(
        self, requests: Sequence[EditRequest], initial: Tensor, alignment: Alignment | None = None
    ) -> Tensor:
        """Optimise the values of requests.

        Args:
            requests: The requests.
            initial: Outputs of the site for the bare prompts, ``z``. Shape ``[n, sites, d_out]``.
            alignment: Ties the values of similar keys together (EAMET).

        Returns:
            ``δ``, the change of the outputs. Shape ``[n, sites, d_out]``, at least float32.

        Raises:
            NonFiniteError: The loss of a request became NaN or infinite.
        """
        initial = initial.to(compute_dtype(initial.dtype))
        encoded = [self._encode(request) for request in requests]

        def found(part: Sequence[int], tie: Alignment | None = None) -> Tensor:
            some = [requests[i] for i in part], [encoded[i] for i in part]
            return self._optimise(*some, initial[list(part)], tie)

        if alignment is not None:  # aligned values depend on those found with them
            done: list[Tensor] = []
            for start in range(0, len(requests), ALIGNED_TOGETHER):
                part = range(start, min(start + ALIGNED_TOGETHER, len(requests)))
                done.append(found(part, alignment.part(start, done)))
            return torch.cat(done)
        delta = torch.empty_like(initial)
        for group in request_groups(self.base, self.site.resumes_at, encoded):
            delta[group] = found(group)
        return delta

    def _optimise(
        self,
        requests: Sequence[EditRequest],
        encoded: Sequence[list[EncodedRow]],
        initial: Tensor,
        tie: Alignment | None,
    ) -> Tensor:
        settings = self.settings
        size = initial.norm(dim=2)
        limit = settings.clamp * size if tie is None else tie.radius(size)
        delta = torch.zeros_like(initial) if tie is None else tie.start(initial)
        adam = Adam(settings.lr, torch.zeros_like(delta), torch.zeros_like(delta))
        counts = [1, *Counter(self.contexts).values()]
        forward = _ForwardPass(
            self.base, self.site, encoded, counts, monitor=settings.consistency > 0
        )
        reference: Tensor | None = None
        if tie is not None:  # it starts elsewhere
            with torch.no_grad():
                reference = forward.run(torch.zeros_like(delta)).essence
        stopping = EarlyStopping(settings, size[:, 0])
        active = list(range(len(requests)))
        for step in range(settings.steps):
            leaf = delta.clone().requires_grad_(True)
            result = forward.run(leaf[active])
            check_reached(result.nll)
            if reference is None:
                reference = result.essence.detach()
            kl = settings.kl_factor * divergence(result.essence, reference[active])
            decay = settings.weight_decay * (leaf.norm(dim=2) / size**2).sum(1)[active]
            loss = stopping.weight[active] * result.nll + kl + decay
            loss = loss + settings.consistency * result.distance
            if tie is not None:
                loss = loss + tie.penalty(leaf[:, -1])[active]
            self._check([requests[index] for index in active], loss.detach())
            done = stopping.finished(loss.detach(), kl.detach(), result.likeliest, active)
            kept = [i for i, ended in enumerate(done.tolist()) if not ended]
            if step == settings.steps - 1 or not kept:
                break
            (gradient,) = torch.autograd.grad(loss[kept].sum(), leaf)
            active = [active[i] for i in kept]
            forward.keep(kept)
            is_active = torch.zeros(len(delta), 1, 1, dtype=torch.bool, device=delta.device)
            is_active[active] = True
            delta = shortened(adam.step(delta, gradient, is_active), limit)
        return delta

    def _check(self, requests: Sequence[EditRequest], loss: Tensor) -> None:
        if bool(torch.isfinite(loss).all()):  # one transfer from the device
            return
        for request, value in zip(requests, loss, strict=True):
            check_finite(f"target loss of {request.label}", self.site.modules[-1], value)

    def _encode(self, request: EditRequest) -> list[EncodedRow]:
        """Rows of a request: its contexts with the answer, each once, then "{subject} is a"."""
        base, subject, answer = self.base, request.subject, request.target_new
        contexts = contexts_of(base, request, list(dict.fromkeys(self.contexts)))
        prompts = [put_before(context, request.prompt) for context in contexts]
        rows = [base.encode(prompt, answer, subject, request.image) for prompt in prompts]
        return [*rows, up_to_subject(base, f"{subject} is a", subject)]
