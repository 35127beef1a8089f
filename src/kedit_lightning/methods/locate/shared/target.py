"""The values that make the model give new answers (ROME's ``v*``), for many requests at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.continuation import Continuation
from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.base_models.taps import add_at, capture, visiting
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.locate.shared.alignment import ALIGNED_TOGETHER, Alignment
from kedit_lightning.methods.locate.shared.budget import requests_at_a_time
from kedit_lightning.requests import EditRequest

#: PMET: once the new answer is the likeliest, its loss counts this much, ...
RELAXED_WEIGHT = 0.1
#: ... and the optimisation ends when the divergence term is this small.
RELAXED_DIVERGENCE = 0.01


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
        patience: A request is finished this many steps after its answer has become the likeliest
            under every context (ENCORE's MPES); ``None`` for never.
        relaxed: Weigh an answer that is the likeliest down until the divergence is small (PMET).
        consistency: Weight of the differences between contexts in later blocks (CORE).
    """

    lr: float = 0.5
    steps: int = 25
    weight_decay: float = 1e-3
    clamp: float = 4.0
    kl_factor: float = 0.0625
    stop_loss: float = 0.05
    patience: int | None = None
    relaxed: bool = False
    consistency: float = 0.0


@dataclass(frozen=True)
class Site:
    """Where values are optimised.

    Args:
        modules: Modules to whose outputs a change is added at the subject's last token.
        block: Number of the block they belong to, or are.
        inside: Whether they are parts of the block, so that it must run for each pass.
    """

    modules: tuple[str, ...]
    block: int
    inside: bool = True

    @property
    def resumes_at(self) -> int:
        """First block that runs in each pass."""
        return self.block if self.inside else self.block + 1


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
        """Update the active rows of ``value``; they have all made the same number of steps."""
        self.steps += 1
        self.mean = torch.where(active, 0.9 * self.mean + 0.1 * gradient, self.mean)
        self.square = torch.where(active, 0.999 * self.square + 0.001 * gradient**2, self.square)
        mean = self.mean / (1 - 0.9**self.steps)
        square = self.square / (1 - 0.999**self.steps)
        return torch.where(active, value - self.lr * mean / (square.sqrt() + 1e-8), value)


@dataclass(frozen=True)
class _Seen:
    """What a pass shows of each request.

    Args:
        nll: Mean negative log-likelihood of the answer over contexts. Shape ``[n]``.
        essence: Log-probabilities after "{subject} is a". Shape ``[n, vocab]``.
        likeliest: Whether the answer is the likeliest under every context. Shape ``[n]``.
        spread: Differences between contexts in later blocks. Shape ``[n]``.
    """

    nll: Tensor
    essence: Tensor
    likeliest: Tensor
    spread: Tensor


class _Program:
    """The rows of some requests in one padded batch: contexts with the answer, "{subject} is a"."""

    def __init__(
        self, base: BaseModel, site: Site, encoded: Sequence[list[EncodedRow]], monitor: bool
    ) -> None:
        self.base = base
        self.site = site
        self.contexts = len(encoded[0]) - 1
        self.monitored = (
            [base.layout.block_name(i) for i in range(site.resumes_at, len(base.layout))]
            if monitor
            else []
        )
        rows = [row for own in encoded for row in own]
        self._place(Continuation(base, rows, site.resumes_at), len(encoded))

    def _place(self, passes: Continuation, count: int) -> None:
        self.passes, self.count = passes, count
        rows = passes.rows
        number = torch.arange(len(rows), device=rows.subject_end.device)
        self._owner = number // (self.contexts + 1)
        self._is_essence = number % (self.contexts + 1) == self.contexts
        row, slot = rows.answer_mask.nonzero(as_tuple=True)
        self._answer_owner, self._answer_ids = self._owner[row], rows.answer_ids[row, slot]
        share = rows.answer_mask.sum(1)[row] * self.contexts
        self._share = 1 / share
        essence = number[self._is_essence]
        self._places = (
            torch.cat([row, essence]),
            torch.cat([rows.answer_columns[row, slot], rows.subject_end[essence]]),
        )

    def keep(self, left: list[int]) -> None:
        """Drop the rows of requests that are finished; numbers are those of the last call."""
        if len(left) == self.count:
            return
        each = self.contexts + 1
        index = torch.tensor([i * each + j for i in left for j in range(each)])
        self._place(self.passes.select(index.to(self.base.device)), len(left))

    def read(self, delta: Tensor) -> _Seen:
        """Run with a change of ``[n, sites, hidden]`` in force."""
        with ExitStack() as stack:
            stack.enter_context(self._changed(delta[self._owner]))
            seen = stack.enter_context(capture(self.base.model, self.monitored))
            logits = self.passes.logits_of(self._places)
        logs = logits.to(delta.dtype).log_softmax(-1)
        answers, essence = logs.split([len(self._answer_ids), self.count])
        chosen = answers.gather(-1, self._answer_ids[:, None])[:, 0]
        missed = (answers.detach().argmax(-1) != self._answer_ids).to(delta.dtype)
        zero = torch.zeros(self.count, dtype=delta.dtype, device=delta.device)
        return _Seen(
            nll=zero.index_add(0, self._answer_owner, -chosen * self._share),
            essence=essence,
            likeliest=zero.index_add(0, self._answer_owner, missed) == 0,
            spread=self._spread([seen.outputs[name] for name in self.monitored], zero),
        )

    @contextmanager
    def _changed(self, change: Tensor) -> Iterator[None]:
        columns = self.passes.rows.subject_end
        visits = {
            name: lambda x, y, i=i: add_at(y, columns, change[:, i])
            for i, name in enumerate(self.site.modules)
        }
        with visiting(self.base.model, visits):
            yield

    def _spread(self, outputs: list[Tensor], zero: Tensor) -> Tensor:
        """``Σ_{i<j} ‖h_i − h_j‖²`` at the subject, by request, over blocks and width (CORE)."""
        at = ~self._is_essence
        for output in outputs:
            rows = torch.arange(len(output), device=output.device)
            hidden = output[rows, self.passes.rows.subject_end][at].to(zero)
            hidden = hidden.reshape(self.count, self.contexts, -1)
            pairs = self.contexts * hidden.square().sum((1, 2)) - hidden.sum(1).square().sum(1)
            zero = zero + pairs / (len(outputs) * hidden.shape[-1])
        return zero


class _Stopping:
    """When requests are finished, and how much their answers count until then."""

    def __init__(self, settings: TargetSettings, like: Tensor) -> None:
        self._settings = settings
        self.weight = torch.ones_like(like)
        self._since = torch.full_like(like, -1)

    def finished(self, loss: Tensor, kept: Tensor, likeliest: Tensor, at: list[int]) -> Tensor:
        """Which of the requests numbered ``at`` are finished, ``[len(at)]`` like the others."""
        settings = self._settings
        done = loss < settings.stop_loss
        if settings.patience is not None:
            self._since[at] += ((self._since[at] >= 0) | likeliest).to(self._since.dtype)
            done = done | (self._since[at] >= settings.patience)
        if settings.relaxed:
            done = done | (likeliest & (kept <= RELAXED_DIVERGENCE))
            self.weight[at] = torch.where(likeliest, RELAXED_WEIGHT, 1.0).to(self.weight.dtype)
        return done


class TargetOptimizer:
    """Finds what must be added to outputs at the subject for the new answers to follow.

    Requests are independent: their losses are summed, each has an Adam state of its own, and those
    that are finished drop out, so the result is that of one at a time.  Only the blocks above the
    site run, from hidden states that are kept, on the tokens from the subject's last one on.

    Args:
        base: The base model, as its stack stands.
        site: Where the change is added.
        contexts: Texts put before each prompt, besides none.
        settings: How values are optimised.
    """

    def __init__(
        self, base: BaseModel, site: Site, contexts: Sequence[str], settings: TargetSettings
    ) -> None:
        self.base = base
        self.site = site
        self.prefixes = ("", *contexts)
        self.settings = settings

    def run(
        self,
        requests: Sequence[EditRequest],
        initial: Tensor,
        alignment: Alignment | None = None,
    ) -> Tensor:
        """Optimise.

        Args:
            requests: What to write; each has a subject.
            initial: Outputs of the site for the bare prompts, ``z``. Shape ``[n, sites, d_out]``.
            alignment: Ties the values of similar keys together (EAMET).

        Returns:
            ``δ``, what must be added. Shape ``[n, sites, d_out]``, at least float32.

        Raises:
            NonFiniteError: The loss of a request became NaN or infinite.
        """
        initial = initial.to(compute_dtype(initial.dtype))
        encoded = [self._encode(request) for request in requests]
        size = requests_at_a_time(self.base, self.site.resumes_at, encoded)
        if alignment is not None:  # aligned values depend on what they are found with
            size = ALIGNED_TOGETHER
        done: list[Tensor] = []
        for start in range(0, len(requests), size):
            part = slice(start, start + size)
            tie = None if alignment is None else alignment.part(start, done)
            done.append(self._optimise(requests[part], encoded[part], initial[part], tie))
        return torch.cat(done)

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
        adam = _Adam(settings.lr, torch.zeros_like(delta), torch.zeros_like(delta))
        program = _Program(self.base, self.site, encoded, settings.consistency > 0)
        with torch.no_grad():
            reference = program.read(torch.zeros_like(delta)).essence
        stopping = _Stopping(settings, size[:, 0])
        active = list(range(len(requests)))
        for step in range(settings.steps):
            leaf = delta.clone().requires_grad_(True)
            seen = program.read(leaf[active])
            kept = settings.kl_factor * divergence(seen.essence, reference[active])
            decay = settings.weight_decay * (leaf.norm(dim=2) / size**2).sum(1)[active]
            loss = stopping.weight[active] * seen.nll + kept + decay
            loss = loss + settings.consistency * seen.spread
            if tie is not None:
                loss = loss + tie.penalty(leaf[:, -1])[active]
            self._check([requests[index] for index in active], loss.detach())
            done = stopping.finished(loss.detach(), kept.detach(), seen.likeliest, active)
            left = [i for i, ended in enumerate(done.tolist()) if not ended]
            if step == settings.steps - 1 or not left:
                break
            (gradient,) = torch.autograd.grad(loss[left].sum(), leaf)
            active = [active[i] for i in left]
            program.keep(left)
            chosen = torch.zeros(len(delta), 1, 1, dtype=torch.bool, device=delta.device)
            chosen[active] = True
            delta = shortened(adam.step(delta, gradient, chosen), limit)
        return delta

    def _check(self, requests: Sequence[EditRequest], loss: Tensor) -> None:
        if bool(torch.isfinite(loss).all()):  # one question to the device
            return
        for request, value in zip(requests, loss, strict=True):
            check_finite(f"target loss of {request.label}", self.site.modules[-1], value)

    def _encode(self, request: EditRequest) -> list[EncodedRow]:
        """Rows of a request: its contexts with the answer, then "{subject} is a"."""
        assert request.subject is not None
        encode = self.base.encode
        rows = [
            encode(p + request.prompt, request.target_new, request.subject) for p in self.prefixes
        ]
        essence = encode(f"{request.subject} is a", None, request.subject)
        if self.base.edits.reads_rows:  # memory edits look at the end of the prompt
            return [*rows, essence]
        # What follows the subject there is never read.
        return [*rows, replace(essence, prompt=essence.prompt[: essence.subject_end + 1])]


def shortened(vectors: Tensor, limit: Tensor) -> Tensor:
    """Pull vectors of ``[..., d]`` back into balls of radius ``limit``, of shape ``[...]``."""
    shrink: Tensor = (limit / vectors.norm(dim=-1).clamp(min=1e-30)).clamp(max=1)
    return vectors * shrink[..., None]
