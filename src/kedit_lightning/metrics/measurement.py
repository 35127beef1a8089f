"""Measurements: what a forward pass shows about a probe, as one plain value.

A metric declares the measurements it reads and the kinds of probe it scores; the reader measures
the union of what all metrics declare. Several measurements of one source share a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from torch import Tensor

from kedit_lightning.metrics.functional.divergence import kl_divergence
from kedit_lightning.metrics.functional.teacher_forcing import (
    exact_match,
    mean_log_prob,
    token_match,
)
from kedit_lightning.requests import ProbeKind

#: What a probe's record can hold: anything that JSON can.
Value: TypeAlias = float | bool | str | list[int] | list[float] | None
#: The tokens that are fed to the model, or ``text`` for what it generates freely:
#: the preferred ``answer``; every accepted one of the ``answers``, of which the largest value
#: counts; the ``contrast`` answer; or the base model's own greedy ``continuation`` of the prompt.
Source: TypeAlias = Literal["answer", "answers", "contrast", "continuation", "text"]


@dataclass(frozen=True)
class ForwardPass:
    """Logits of one teacher-forced pass, in at least float32.

    Args:
        logits: Logits that predict the fed tokens. Shape ``[rows, tokens, vocab]``.
        ids: Fed tokens. Shape ``[rows, tokens]``.
        mask: True where ``ids`` holds a token, False on padding. Shape ``[rows, tokens]``.
        base_logits: Logits of the unedited model in the same pass, for the source
            ``continuation``; ``None`` where the model is unedited. Shape as of ``logits``.
    """

    logits: Tensor
    ids: Tensor
    mask: Tensor
    base_logits: Tensor | None = None

    @cached_property
    def predicted(self) -> Tensor:
        """Arg-max ids. Shape ``[rows, tokens]``."""
        return self.logits.argmax(-1)

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probabilities. Shape ``[rows, tokens, vocab]``."""
        return self.logits.log_softmax(-1)


@dataclass(frozen=True)
class Measurement:
    """One plain value of a probe, measured on one state of the model.

    Args:
        name: Key of the value in records (``probe["after"][name]``). A measurement that is
            computed differently needs another name: base-model values are cached under it.
        source: The tokens of the forward pass that it is computed from.
        compute: Function from a forward pass to one value a row; unused for the source ``text``.
    """

    name: str
    source: Source
    compute: Callable[[ForwardPass], Sequence[Value]] = lambda forward: []

    def of(self, reading: Mapping[str, object]) -> Any:
        """The measured value, ``None`` where it was not measured.

        Args:
            reading: Measurements of a probe, such as ``probe["after"]``.
        """
        return reading.get(self.name)


def _token_match(forward: ForwardPass) -> list[float]:
    shares: list[float] = token_match(forward.predicted, forward.ids, forward.mask).tolist()
    return shares


def _exact_match(forward: ForwardPass) -> list[bool]:
    exact: list[bool] = exact_match(forward.predicted, forward.ids, forward.mask).tolist()
    return exact


def _log_prob(forward: ForwardPass) -> list[float]:
    fed = forward.log_probs.gather(-1, forward.ids[..., None])[..., 0]
    means: list[float] = mean_log_prob(fed, forward.mask).tolist()
    return means


def _top1(forward: ForwardPass) -> list[list[int]]:
    rows = zip(forward.predicted, forward.mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def _kl(forward: ForwardPass) -> list[float]:
    if forward.base_logits is None:
        return [0.0] * len(forward.logits)
    base = forward.base_logits.log_softmax(-1)
    divergences: list[float] = kl_divergence(base, forward.log_probs, forward.mask).tolist()
    return divergences


#: Share of the preferred answer's tokens that are arg-max.
TF_TOK = Measurement("tf_tok", "answer", _token_match)
#: Whether every token of an accepted answer is arg-max.
TF_ALL = Measurement("tf_all", "answers", _exact_match)
#: Mean log-probability of the preferred answer's tokens.
LOG_PROB = Measurement("log_prob", "answer", _log_prob)
#: The same of the contrast answer.
CONTRAST_LOG_PROB = Measurement("contrast_log_prob", "contrast", _log_prob)
#: Greedy free generation up to the model's own stop; absent where the protocol generates nothing.
TEXT = Measurement("text", "text")
#: Arg-max ids along the base model's continuation.
TOP1 = Measurement("top1", "continuation", _top1)
#: KL divergence from the base model along its continuation, mean over positions, in nats.
KL = Measurement("kl", "continuation", _kl)
#: Arg-max ids along the preferred answer, where EasyEdit compares them.
ANSWER_TOP1 = Measurement("top1", "answer", _top1)

#: Measured of every probe under every scoring.
RECORDED = (TF_TOK, TF_ALL, LOG_PROB, CONTRAST_LOG_PROB, TEXT)


def built_in(kind: ProbeKind) -> tuple[str, ...]:
    """Names of the measurements that this package's own metrics need of a kind of probe, in order.

    Args:
        kind: Kind of the probe.

    >>> built_in("locality")[-2:]
    ('top1', 'kl')
    """
    more = (TOP1, KL) if kind == "locality" else ()
    return tuple(measurement.name for measurement in (*RECORDED, *more))
