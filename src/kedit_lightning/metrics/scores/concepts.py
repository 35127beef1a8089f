"""Scores of edited definitions of concepts, as ConceptEdit asks for them (Wang et al. 2024)."""

from __future__ import annotations

from kedit_lightning.metrics.example_record import ProbeReading, ProbeRecord
from kedit_lightning.metrics.functional.yes_no import share_of_yes, yes_or_no
from kedit_lightning.metrics.measurement import (
    JUDGED,
    PASSAGE,
    RIGHT_GREEDY,
    RIGHT_LOG_PROBS,
    WRONG_GREEDY,
    WRONG_LOG_PROBS,
)
from kedit_lightning.metrics.scores.case_mean import ProbeMean
from kedit_lightning.metrics.scores.passages import PassageCosine


def _said(reading: ProbeReading) -> bool | None:
    """Yes or no, ``None`` for neither."""
    yes, no = RIGHT_GREEDY.of(reading), WRONG_GREEDY.of(reading)
    return yes_or_no(yes, no) if yes and no else None


class InstanceChange(ProbeMean):
    """Share of instances whose answer, yes or no, the edit changed (instance change).

    The question is whether an instance belongs to the concept whose definition was replaced. Yes
    is what greedy decoding says where all tokens of a form of it are arg-max, and so is no.
    Instances of which the model says neither, before or after the edit, are left out here, and
    counted as ``instance_unparsed``.
    """

    name = "instance_change"
    kinds = ("portability",)
    tasks = ("instance",)
    measurements = (RIGHT_GREEDY, WRONG_GREEDY)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0; ``None`` where an answer is neither yes nor no."""
        before, after = _said(probe["base"]), _said(probe["after"])
        return None if before is None or after is None else cls.of_answers(before, after)

    @classmethod
    def of_answers(cls, before: bool, after: bool) -> float | None:
        """The value of two answers, of which yes is True."""
        return float(before != after)


class InstanceToNo(InstanceChange):
    """Share of instances that belonged to the concept before the edit, and no longer do.

    Of those whose answer was yes; what an edit of module inter should lead to.
    """

    name = "instance_to_no"

    @classmethod
    def of_answers(cls, before: bool, after: bool) -> float | None:
        """1 or 0; ``None`` where the answer was no before."""
        return float(not after) if before else None


class InstanceToYes(InstanceChange):
    """Share of instances that did not belong to the concept before the edit, and now do.

    Of those whose answer was no.
    """

    name = "instance_to_yes"

    @classmethod
    def of_answers(cls, before: bool, after: bool) -> float | None:
        """1 or 0; ``None`` where the answer was yes before."""
        return None if before else float(after)


class InstanceUnparsed(InstanceChange):
    """Share of instances of which the model says neither yes nor no after the edit."""

    name = "instance_unparsed"
    higher_is_better = False

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0."""
        after = probe["after"]
        measured = RIGHT_GREEDY.of(after) and WRONG_GREEDY.of(after)
        return float(_said(after) is None) if measured else None


class InstanceShift(InstanceChange):
    """How much the edit moved the probability of yes, among yes and no, away from where it was.

    The absolute difference over all instances, also those of which the model says neither.
    """

    name = "instance_shift"
    measurements = (RIGHT_LOG_PROBS, WRONG_LOG_PROBS)
    is_share = False

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """Between 0 and 1."""
        shares = [
            share_of_yes(yes, no)
            for state in (probe["base"], probe["after"])
            if (yes := RIGHT_LOG_PROBS.of(state)) and (no := WRONG_LOG_PROBS.of(state))
        ]
        return abs(shares[1] - shares[0]) if len(shares) == 2 else None


class ConsistencyCosine(PassageCosine):
    """Concept consistency by embeddings: cosine of the generated and the new definition.

    By the sentence-transformers model that the protocol names (``protocol.embedder``); without one
    there is no such score. It stands in for no judge: the paper has a judge.
    """

    name = "consistency_cosine"
    kinds = ("rewrite", "rephrase")
    tasks = ("concept",)


class ConsistencyJudged(ProbeMean):
    """Concept consistency by a judge: share of generated definitions that say the new one.

    The judge is the model that the protocol names (``protocol.judge``); without one there is no
    such score. Published figures are marks between -1 and 1 that were given to texts by hand.
    """

    name = "consistency_judge"
    kinds = ("rewrite", "rephrase")
    tasks = ("concept",)
    measurements = (PASSAGE, JUDGED)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0 after the edit."""
        value = JUDGED.of(probe["after"])
        return None if value is None else float(value)


CONCEPT_SCORES: tuple[type[ProbeMean], ...] = (
    InstanceChange,
    InstanceToNo,
    InstanceToYes,
    InstanceUnparsed,
    InstanceShift,
    ConsistencyCosine,
    ConsistencyJudged,
)
