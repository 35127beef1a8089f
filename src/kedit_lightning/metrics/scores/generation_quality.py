"""Free answers beyond right and wrong: overlap, running on, repetition, several wordings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from kedit_lightning.metrics.example_record import ProbeRecord
from kedit_lightning.metrics.functional.text_match import (
    AnswerRule,
    generation_f1,
    repetition_rate,
    runs_on,
)
from kedit_lightning.metrics.measurement import TEXT
from kedit_lightning.metrics.scores.answers import (
    GenerationContains,
    GenerationMean,
    SquadContains,
)
from kedit_lightning.metrics.scores.case_mean import ProbeMean


class AnswerOverlap(ProbeMean):
    """Overlap of words between the free generation's first sentence and an accepted answer.

    The harmonic mean of precision and recall of words (F1 of SQuAD, Rajpurkar et al. 2016), of the
    best answer.
    """

    name = "gen_f1"
    measurements = (TEXT,)
    is_share = True
    rule: ClassVar[AnswerRule] = "words"

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The overlap after the edit, ``None`` without a generation or without answers."""
        text, answers = TEXT.of(probe["after"]), probe["answers"]
        return None if text is None or not answers else generation_f1(text, answers, cls.rule)


class RunOn(ProbeMean):
    """Share of probes whose free generation begins with an accepted answer and does not stop there.

    What a model says behind a right answer makes it wrong for a reader (Yang et al. 2025,
    arXiv:2502.11177).
    """

    name = "runon"
    measurements = (TEXT,)
    is_share = True
    higher_is_better = False
    rule: ClassVar[AnswerRule] = "words"

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0 after the edit."""
        text, answers = TEXT.of(probe["after"]), probe["answers"]
        return None if text is None or not answers else float(runs_on(text, answers, cls.rule))


class Repetition(ProbeMean):
    """Share of the trigrams of the free generation that it has used before.

    A collapsed model repeats itself.
    """

    name = "repeat"
    kinds = ("rewrite", "rephrase", "portability", "locality")
    measurements = (TEXT,)
    is_share = True
    higher_is_better = False

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The share after the edit."""
        text = TEXT.of(probe["after"])
        return None if text is None else repetition_rate(text)


class AnyWording(ProbeMean):
    """Whether a free generation states an accepted answer for at least one wording of a question.

    A case counts once, with all its probes of a group; of portability ``multi_hop`` this is the
    accuracy of MQuAKE (Zhong et al. 2023), for which one of three wordings is enough.
    """

    name = "gen_any"
    kinds = ("portability",)
    measurements = (TEXT,)
    is_share = True
    stated: ClassVar[type[GenerationMean]] = GenerationContains

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0 after the edit."""
        return cls.stated.read(probe)

    @classmethod
    def case_value(cls, probes: Iterable[ProbeRecord]) -> float | None:
        """The largest value of the case's probes."""
        return max((v for v in map(cls.read, probes) if v is not None), default=None)


class AllWordings(ProbeMean):
    """Whether free generations state an accepted answer for every wording of a question.

    The strict counterpart of ``gen_any``.
    """

    name = "gen_all"
    kinds = ("portability",)
    measurements = (TEXT,)
    is_share = True
    stated: ClassVar[type[GenerationMean]] = GenerationContains

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0 after the edit."""
        return cls.stated.read(probe)

    @classmethod
    def case_value(cls, probes: Iterable[ProbeRecord]) -> float | None:
        """The smallest value of the case's probes."""
        return min((v for v in map(cls.read, probes) if v is not None), default=None)


class SquadOverlap(AnswerOverlap):
    """Overlap of words by the rule of SQuAD, for which no punctuation counts."""

    rule = "squad"


class SquadRunOn(RunOn):
    """Running on by the rule of SQuAD, for which no punctuation counts."""

    rule = "squad"


class SquadAnyWording(AnyWording):
    """Any wording by the rule of SQuAD, for which no punctuation counts."""

    stated = SquadContains


class SquadAllWordings(AllWordings):
    """All wordings by the rule of SQuAD, for which no punctuation counts."""

    stated = SquadContains


#: Scores by the rule of SQuAD, by the class that each replaces.
SQUAD_GENERATION: dict[type[ProbeMean], type[ProbeMean]] = {
    AnswerOverlap: SquadOverlap,
    RunOn: SquadRunOn,
    AnyWording: SquadAnyWording,
    AllWordings: SquadAllWordings,
}
GENERATION_SCORES: tuple[type[ProbeMean], ...] = (
    AnswerOverlap,
    RunOn,
    Repetition,
    AnyWording,
    AllWordings,
)
