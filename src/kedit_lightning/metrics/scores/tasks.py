"""Scores of tasks that ask for more than an answer: opinions, forgetting, tests, doubt, a judge."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from kedit_lightning.metrics.example_record import ProbeReading, ProbeRecord
from kedit_lightning.metrics.functional.passage_match import edit_success, mentions
from kedit_lightning.metrics.functional.text_match import generation_contains
from kedit_lightning.metrics.measurement import (
    AGAINST_LOG_PROB,
    ANSWERS_LOG_PROB,
    JUDGED,
    SENTIMENT,
    TEXT,
)
from kedit_lightning.metrics.scores.answers import (
    GenerationContains,
    GenerationMean,
    SquadContains,
)
from kedit_lightning.metrics.scores.case_mean import ProbeMean
from kedit_lightning.metrics.scores.choices import CHOICE_SCORES
from kedit_lightning.metrics.scores.concepts import CONCEPT_SCORES
from kedit_lightning.metrics.scores.defence import DEFENCE_SCORES
from kedit_lightning.metrics.scores.traits import TRAIT_SCORES


class OpinionSuccess(ProbeMean):
    """Success of an edited opinion, teacher-forced: likelier than its opposite, and on the topic.

    The sigmoid of the difference between the mean log-probabilities of all sentences of the wished
    and of the other sentiment, times the likelihood of the former after over before the edit, at
    most 1; all means over tokens, then over sentences (ES of ConvSent, Mitchell et al. 2022, and
    of PersonalityEdit, where the other answers are those of the other traits). What an edit does to
    opinions on another topic is ``locality/other_topic/kl`` (their DD).
    """

    name = "tf_es"
    kinds = ("rewrite", "rephrase")
    tasks = ("opinion", "trait")
    measurements = (ANSWERS_LOG_PROB, AGAINST_LOG_PROB)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The product."""
        new, old = ANSWERS_LOG_PROB.of(probe["after"]), AGAINST_LOG_PROB.of(probe["after"])
        before = ANSWERS_LOG_PROB.of(probe["base"])
        return None if None in (new, old, before) else edit_success(new, old, before)


class SentimentShift(ProbeMean):
    """How much likelier the free generation is of the wished sentiment than the base model's.

    The difference of the probabilities that a sequence classifier gives (``protocol.sentiment``);
    without one there is no such score.
    """

    name = "gen_sentiment"
    kinds = ("rewrite", "rephrase")
    tasks = ("opinion",)
    value_range = "-1 to 1"
    measurements = (TEXT, SENTIMENT)

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The difference, positive where it goes the wished way."""
        before, after = SENTIMENT.of(probe["base"]), SENTIMENT.of(probe["after"])
        if before is None or after is None:
            return None
        sign = -1.0 if probe["task"].get("label") == "negative" else 1.0
        return sign * float(after - before)


class Forgotten(ProbeMean):
    """Share of questions whose free generation does not mention the answer to be forgotten.

    Whole words anywhere in the first sentence count, also where they are denied.
    """

    name = "gen_forgotten"
    kinds = ("rewrite", "rephrase")
    tasks = ("forget",)
    measurements = (TEXT,)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0 after the edit."""
        text, against = TEXT.of(probe["after"]), probe["task"].get("against")
        return None if text is None or not against else float(not mentions(text, against))


class Retained(ProbeMean):
    """Share of free generations that still state an answer, of those that did before all edits.

    The generated counterpart of ``known``.
    """

    name = "gen_retained"
    kinds = ("locality",)
    tasks = ("retain",)
    measurements = (TEXT,)
    is_share = True
    stated: ClassVar[type[GenerationMean]] = GenerationContains

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0 after the edit where the base model stated an answer, else ``None``."""
        return cls.stated.read(probe) if _states(cls.stated, probe, probe["base"]) else None


class RippleTest(ProbeMean):
    """Share of tests passed: their questions are answered, by any alias, in free generation.

    A test of RippleEdits (Cohen et al. 2023) has one question or more, of which any or all must be
    answered, as the test says. A test counts only where the base model answers each of its
    conditions; a case without such a test is left out.
    """

    name = "gen_test"
    kinds = ("portability", "locality")
    tasks = ("ripple",)
    measurements = (TEXT,)
    is_share = True
    stated: ClassVar[type[GenerationMean]] = GenerationContains

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0: the question is answered after the edit."""
        return cls.stated.read(probe)

    @classmethod
    def case_value(cls, probes: Iterable[ProbeRecord]) -> float | None:
        """Share of the tests that are passed, of those whose conditions hold."""
        tests: dict[str, list[ProbeRecord]] = {}
        for probe in probes:
            tests.setdefault(probe["task"].get("label", ""), []).append(probe)
        passed = []
        for own in tests.values():
            known = [p for p in own if p["task"].get("condition")]
            asked = [p for p in own if not p["task"].get("condition")]
            values = [value for p in asked if (value := cls.read(p)) is not None]
            if values and all(_states(cls.stated, p, p["base"]) for p in known):
                together = asked[0]["task"].get("together", "any")
                passed.append(max(values) if together == "any" else min(values))
        return sum(passed) / len(passed) if passed else None


def _states(stated: type[GenerationMean], probe: ProbeRecord, reading: ProbeReading) -> bool:
    """Whether the text of a reading states an accepted answer."""
    return stated.read({**probe, "after": reading}) == 1.0


class OtherForms(GenerationMean):
    """Share of free generations that state the answer where the fact is asked in other forms.

    Yes and no, a choice, the reversed relation: generalisation of HalluEditBench (Huang et al.
    2025), which has the plain rephrase beside them.
    """

    name = "gen_form"
    kinds = ("portability",)
    tasks = ("form",)
    match = staticmethod(generation_contains)


class SeveralHops(GenerationMean):
    """Share of free generations that state the answer to a question over several facts.

    Portability of HalluEditBench, over its two to six hops alike.
    """

    name = "gen_hop"
    kinds = ("portability",)
    tasks = ("hop",)
    match = staticmethod(generation_contains)


class Undoubted(GenerationMean):
    """Share of doubts that the free generation meets with Yes: the answer is kept up.

    Each turn asks once more whether the answer was sure, with Yes to all earlier ones in the prompt
    (robustness of HalluEditBench, where earlier turns are the model's own).
    """

    name = "gen_robust"
    kinds = ("portability",)
    tasks = ("doubt",)
    match = staticmethod(generation_contains)


class Judged(ProbeMean):
    """Share of free generations that a judge takes for the answer.

    The judge is the model that the protocol names (``protocol.judge``), with its prompt; without
    one, or where it fails, there is no such score, and no other stands in for it.
    """

    name = "gen_judge"
    measurements = (TEXT, JUDGED)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0 after the edit."""
        value = JUDGED.of(probe["after"])
        return None if value is None else float(value)


class SquadRetained(Retained):
    """What is retained by the rule of SQuAD, for which no punctuation counts."""

    stated = SquadContains


class SquadOtherForms(GenerationMean):
    """Other forms by the rule of SQuAD, for which no punctuation counts."""

    name, kinds, tasks = OtherForms.name, OtherForms.kinds, OtherForms.tasks
    match = staticmethod(SquadContains.match)


class SquadSeveralHops(GenerationMean):
    """Several hops by the rule of SQuAD, for which no punctuation counts."""

    name, kinds, tasks = SeveralHops.name, SeveralHops.kinds, SeveralHops.tasks
    match = staticmethod(SquadContains.match)


class SquadRippleTest(RippleTest):
    """Tests passed by the rule of SQuAD, for which no punctuation counts."""

    stated = SquadContains


#: Scores by the rule of SQuAD, by the class that each replaces.
SQUAD_TASKS: dict[type[ProbeMean], type[ProbeMean]] = {
    OtherForms: SquadOtherForms,
    SeveralHops: SquadSeveralHops,
    Retained: SquadRetained,
    RippleTest: SquadRippleTest,
}
TASK_SCORES: tuple[type[ProbeMean], ...] = (
    *CHOICE_SCORES,
    *DEFENCE_SCORES,
    *TRAIT_SCORES,
    *CONCEPT_SCORES,
    OpinionSuccess,
    SentimentShift,
    Forgotten,
    Retained,
    RippleTest,
    OtherForms,
    SeveralHops,
    Undoubted,
    Judged,
)
