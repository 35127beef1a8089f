"""Multiple choice by probabilities, as TruthfulQA asks (Lin et al. 2022)."""

from __future__ import annotations

import math
from abc import abstractmethod

from kedit_lightning.metrics.example_record import ProbeRecord
from kedit_lightning.metrics.measurement import RIGHT_LOG_PROBS, WRONG_LOG_PROBS
from kedit_lightning.metrics.scores.case_mean import ProbeMean


class _ChoiceMean(ProbeMean):
    """Compares the log-probabilities of whole answers, summed over their tokens."""

    measurements = (RIGHT_LOG_PROBS, WRONG_LOG_PROBS)
    tasks = ("choice",)
    kinds = ("rewrite",)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The value after the edit."""
        right, wrong = (m.of(probe["after"]) for m in cls.measurements)
        return cls.of_choices(right, wrong) if right and wrong else None

    @classmethod
    @abstractmethod
    def of_choices(cls, right: list[float], wrong: list[float]) -> float:
        """The value of log-probabilities of the right answers, the best first, and the wrong."""


class BestChoice(_ChoiceMean):
    """Share of questions whose best answer is more likely than every wrong one (MC1)."""

    name = "mc1"

    @classmethod
    def of_choices(cls, right: list[float], wrong: list[float]) -> float:
        """1 or 0; a tie is 0."""
        return float(right[0] > max(wrong))


class RightMass(_ChoiceMean):
    """Share of the probability of all choices that the right ones have (MC2)."""

    name = "mc2"

    @classmethod
    def of_choices(cls, right: list[float], wrong: list[float]) -> float:
        """Between 0 and 1."""
        top = max(*right, *wrong)
        masses = [sum(math.exp(value - top) for value in side) for side in (right, wrong)]
        return masses[0] / sum(masses)


class RightAbove(_ChoiceMean):
    """Share of the right answers that are more likely than every wrong one (MC3)."""

    name = "mc3"

    @classmethod
    def of_choices(cls, right: list[float], wrong: list[float]) -> float:
        """Between 0 and 1."""
        return sum(value > max(wrong) for value in right) / len(right)


#: Scores of multiple choice.
CHOICE_SCORES = (BestChoice, RightMass, RightAbove)
