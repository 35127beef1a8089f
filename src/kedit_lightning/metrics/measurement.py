"""Measurements of a probe: one plain value each, computed from the logits of a forward pass.

A metric declares the measurements it reads and the kinds of probe it scores; the reader measures
the union of what all metrics declare. Several measurements of one source share a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Literal, TypeAlias

from torch import Tensor

from kedit_lightning.metrics.functional.divergence import kl_divergence, rank_agreement
from kedit_lightning.metrics.functional.teacher_forcing import (
    exact_match,
    mean_log_prob,
    token_match,
)
from kedit_lightning.requests import ProbeKind

#: A value as JSON holds it.
Value: TypeAlias = float | bool | str | list[int] | list[float] | None
#: The tokens that are fed to the model: the preferred ``answer``; each of the accepted ``answers``,
#: of which the largest value counts; the ``contrast``; those that the task is ``against``; or the
#: base model's own greedy ``continuation`` of the prompt. Of a ``row``, which is the prompt and the
#: preferred answer, all logits are read. ``text`` is a free generation up to the
#: end of its first sentence, ``passage`` one that may be as long as a passage, ``sample`` one whose
#: tokens are drawn with a seed. What is measured of a ``record`` is computed from the texts in it,
#: such as by a judge.
Source: TypeAlias = Literal[
    "answer",
    "answers",
    "contrast",
    "against",
    "continuation",
    "row",
    "text",
    "passage",
    "sample",
    "record",
]


@dataclass(frozen=True)
class ForwardPass:
    """Logits of one teacher-forced pass, in at least float32.

    ``base_logits`` are those of the unedited model on the same rows, for the sources
    ``continuation`` and ``row``; ``None`` where the model itself is unedited.
    """

    logits: Tensor  # that predict the fed tokens, [rows, tokens, vocab]
    ids: Tensor  # fed tokens, [rows, tokens]
    mask: Tensor  # True where `ids` holds a token, False on padding, [rows, tokens]
    base_logits: Tensor | None = None  # [rows, tokens, vocab]

    @cached_property
    def predicted(self) -> Tensor:
        """Arg-max ids. Shape ``[rows, tokens]``."""
        return self.logits.argmax(-1)

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probabilities. Shape ``[rows, tokens, vocab]``."""
        return self.logits.log_softmax(-1)

    @cached_property
    def fed_log_probs(self) -> Tensor:
        """Log-probabilities of the fed tokens. Shape ``[rows, tokens]``."""
        return self.log_probs.gather(-1, self.ids[..., None])[..., 0]


@dataclass(frozen=True)
class Measurement:
    """One plain value of a probe, measured on one state of the model.

    A measurement that is computed differently needs another name: base-model values are cached
    under it.
    """

    name: str  # key of the value in records: `probe["after"][name]`
    source: Source  # the tokens of the forward pass that it is computed from
    #: Function from a forward pass to one value a row; unused for texts and records.
    compute: Callable[[ForwardPass], Sequence[Value]] = lambda forward: []
    #: Value of several rows, such as of all accepted answers.
    together: Callable[[Sequence[Any]], Value] = max

    def of(self, reading: Mapping[str, object]) -> Any:
        """The value in a reading, such as ``probe["after"]``; ``None`` where it has none."""
        return reading.get(self.name)


def _log_prob(forward: ForwardPass) -> Any:
    return mean_log_prob(forward.fed_log_probs, forward.mask).tolist()


def _sum_log_prob(forward: ForwardPass) -> Any:
    return forward.fed_log_probs.masked_fill(~forward.mask, 0.0).sum(-1).tolist()


def _greedy(forward: ForwardPass) -> Any:
    return exact_match(forward.predicted, forward.ids, forward.mask).tolist()


def _top1(forward: ForwardPass) -> Any:
    rows = zip(forward.predicted, forward.mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def _ranks(forward: ForwardPass, ranks: int) -> Any:
    base = forward.logits if forward.base_logits is None else forward.base_logits
    return rank_agreement(base, forward.logits, forward.mask, ranks).tolist()


def _kl(forward: ForwardPass) -> Any:
    if forward.base_logits is None:
        return [0.0] * len(forward.logits)
    base = forward.base_logits.log_softmax(-1)
    return kl_divergence(base, forward.log_probs, forward.mask).tolist()


#: Share of the preferred answer's tokens that are arg-max.
TF_TOK = Measurement("tf_tok", "answer", lambda f: token_match(f.predicted, f.ids, f.mask).tolist())
#: Whether every token of an accepted answer is arg-max.
TF_ALL = Measurement("tf_all", "answers", _greedy)
#: Mean log-probability of the tokens of the preferred answer, and of the contrast.
LOG_PROB = Measurement("log_prob", "answer", _log_prob)
CONTRAST_LOG_PROB = Measurement("contrast_log_prob", "contrast", _log_prob)
#: Mean over the accepted answers of the mean log-probability of their tokens; the same of the
#: answers that the task is against.
ANSWERS_LOG_PROB = Measurement("answers_log_prob", "answers", _log_prob, fmean)
AGAINST_LOG_PROB = Measurement("against_log_prob", "against", _log_prob, fmean)
#: Log-probabilities of whole answers, summed over their tokens: the accepted ones, and those that
#: the task is against.
RIGHT_LOG_PROBS = Measurement("right_log_probs", "answers", _sum_log_prob, list)
WRONG_LOG_PROBS = Measurement("wrong_log_probs", "against", _sum_log_prob, list)
#: Whether greedy decoding says each of them: all of its tokens are arg-max.
RIGHT_GREEDY = Measurement("right_greedy", "answers", _greedy, list)
WRONG_GREEDY = Measurement("wrong_greedy", "against", _greedy, list)
#: Greedy free generation up to the model's own stop, where the protocol generates.
TEXT = Measurement("text", "text")
#: Greedy free generation with room for a passage, of probes whose answer is one.
PASSAGE = Measurement("passage", "passage")
#: Sampled free generation of a fixed length, where the protocol asks for one.
SAMPLE = Measurement("sample", "sample")
#: Cosine of the embeddings of the passage and of the nearest answer.
COSINE = Measurement("cosine", "record")
#: Probability that the free generation is of positive sentiment, by a classifier.
SENTIMENT = Measurement("sentiment", "record")
#: Probability that the free generation is unsafe, by a classifier.
UNSAFE = Measurement("unsafe", "record")
#: Probabilities of the traits that the free generation may show, in their order, by a classifier.
TRAIT_SHARES = Measurement("trait_shares", "record")
#: Mark from 1 to 5 that a judge gives to how well the adjectives of a trait fit the generation.
RATING = Measurement("rating", "record")
#: Whether a judge takes the free generation for the answer.
JUDGED = Measurement("judged", "record")
#: Arg-max ids along the base model's continuation, or (for EasyEdit) along the preferred answer.
TOP1 = Measurement("top1", "continuation", _top1)
ANSWER_TOP1 = Measurement("top1", "answer", _top1)
#: KL divergence from the base model along its continuation, mean over positions, in nats.
KL = Measurement("kl", "continuation", _kl)

#: Share of all positions of a row at which the likeliest token is that of the base model; and of
#: the ten likeliest, in their order.
ROW_TOP1 = Measurement("row_top1", "row", lambda f: _ranks(f, 1))
ROW_TOP10 = Measurement("row_top10", "row", lambda f: _ranks(f, 10))

#: Measured of every probe under every scoring.
RECORDED = (TF_TOK, TF_ALL, LOG_PROB, CONTRAST_LOG_PROB, TEXT)


def built_in(kind: ProbeKind) -> tuple[str, ...]:
    """Names of the measurements that this package's own metrics read of a kind of probe.

    >>> built_in("locality")[-2:]
    ('top1', 'kl')
    """
    measurements = (*RECORDED, TOP1, KL) if kind == "locality" else RECORDED
    return tuple(measurement.name for measurement in measurements)
