"""Efficacy, generalisation and portability: answers after the edit, forced and generated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from kedit_lightning.metrics.example_record import ProbeRecord
from kedit_lightning.metrics.functional.text_match import generation_contains, generation_exact
from kedit_lightning.metrics.measurement import CONTRAST_LOG_PROB, LOG_PROB, TEXT, TF_ALL, TF_TOK
from kedit_lightning.metrics.scores.case_mean import ProbeMean


class TokenMatch(ProbeMean):
    """Share of the answer's tokens that are arg-max, teacher-forced."""

    name = "tf_tok"
    measurements = (TF_TOK,)
    is_share = True


class ExactMatch(ProbeMean):
    """Share of probes of which an accepted answer's tokens are all arg-max, teacher-forced."""

    name = "tf_all"
    measurements = (TF_ALL,)
    is_share = True


class ProbabilityPreference(ProbeMean):
    """Share of probes whose answer is more likely than the contrast, by mean a token."""

    name = "p_new_gt_old"
    measurements = (LOG_PROB, CONTRAST_LOG_PROB)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0 after the edit; a tie is 0."""
        new, old = LOG_PROB.of(probe["after"]), CONTRAST_LOG_PROB.of(probe["after"])
        return None if new is None or old is None else float(new > old)


class NegativeLogLikelihood(ProbeMean):
    """Mean negative log-likelihood of the preferred answer's tokens, teacher-forced, in nats."""

    name = "nll"
    value_range = "0 upwards"
    measurements = (LOG_PROB,)
    higher_is_better = False

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The negative mean log-probability after the edit."""
        value = LOG_PROB.of(probe["after"])
        return None if value is None else -float(value)


class GenerationMean(ProbeMean):
    """Share of probes whose free generation matches an accepted answer."""

    measurements = (TEXT,)
    is_share = True

    #: Whether a text (first argument) matches one of the answers (second).
    match: ClassVar[Callable[..., bool]]

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0 after the edit, ``None`` without a generation or without answers."""
        text, answers = TEXT.of(probe["after"]), probe["answers"]
        return None if text is None or not answers else float(cls.match(text, answers))


class GenerationExact(GenerationMean):
    """Share of probes whose free generation is an accepted answer and then stops."""

    name = "gen_em"
    match = staticmethod(generation_exact)


class GenerationContains(GenerationMean):
    """Share of probes whose free generation states an accepted answer."""

    name = "gen_contains"
    match = staticmethod(generation_contains)


class Inflation(ProbeMean):
    """How far teacher forcing flatters: token match minus exact generation."""

    name = "inflation"
    value_range = "-1 to 1"
    exact: ClassVar[type[GenerationMean]] = GenerationExact
    measurements = (TF_TOK, TEXT)
    higher_is_better = False

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """Difference of the two scores, after the edit."""
        forced, free = TokenMatch.read(probe), cls.exact.read(probe)
        return None if forced is None or free is None else forced - free


class SquadExact(GenerationMean):
    """Exact generation by the rule of SQuAD, for which no punctuation counts."""

    name = GenerationExact.name
    match = staticmethod(partial(generation_exact, rule="squad"))


class SquadContains(GenerationMean):
    """A stated answer by the rule of SQuAD, for which no punctuation counts."""

    name = GenerationContains.name
    match = staticmethod(partial(generation_contains, rule="squad"))


class SquadInflation(Inflation):
    """Inflation with exact generation by the rule of SQuAD."""

    exact = SquadExact


#: Scores by the rule of SQuAD, by the class that each replaces.
SQUAD_SCORES: dict[type[ProbeMean], type[ProbeMean]] = {
    GenerationExact: SquadExact,
    GenerationContains: SquadContains,
    Inflation: SquadInflation,
}
ANSWER_SCORES: tuple[type[ProbeMean], ...] = (
    TokenMatch,
    ExactMatch,
    ProbabilityPreference,
    NegativeLogLikelihood,
    GenerationExact,
    GenerationContains,
    Inflation,
)
