"""Scores of edited traits, as PersonalityEdit asks for them (Mao et al. 2024)."""

from __future__ import annotations

import math
from typing import ClassVar

from kedit_lightning.metrics.example_record import ProbeReading, ProbeRecord
from kedit_lightning.metrics.functional.text_match import mean_ngram_entropy
from kedit_lightning.metrics.measurement import PASSAGE, RATING, TRAIT_SHARES
from kedit_lightning.metrics.scores.case_mean import ProbeMean
from kedit_lightning.probe_task import TRAITS

#: N-gram entropy from which a text is taken for coherent, as in the released code.
COHERENT = 3.5
#: Smallest probability whose logarithm is taken.
_LEAST = 1e-12


def _coherent(probe: ProbeRecord) -> bool | None:
    """Whether both texts, before and after, are coherent; ``None`` where one is absent."""
    texts = [PASSAGE.of(probe["base"]), PASSAGE.of(probe["after"])]
    if None in texts:
        return None
    return all(mean_ngram_entropy([text]) >= COHERENT for text in texts)


class TraitCoherent(ProbeMean):
    """Share of opinions that are coherent text, without and with the edit.

    Of an n-gram entropy of at least 3.5, as in the released code; the other scores of generated
    opinions leave out those that are not.
    """

    name = "trait_coherent"
    kinds = ("rewrite", "rephrase")
    tasks = ("trait",)
    measurements = (PASSAGE,)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0."""
        coherent = _coherent(probe)
        return None if coherent is None else float(coherent)


class _TraitScore(ProbeMean):
    """A score of coherent opinions by what was measured of both texts."""

    kinds = ("rewrite", "rephrase")
    tasks = ("trait",)
    #: Whether the text before the edit is measured too.
    compares: ClassVar[bool] = True

    @classmethod
    def of(cls, probe: ProbeRecord, state: ProbeReading) -> float | None:
        """The value of one text."""
        raise NotImplementedError

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The value after the edit, less that before it where both are compared."""
        if not _coherent(probe):
            return None
        after = cls.of(probe, probe["after"])
        before = cls.of(probe, probe["base"]) if cls.compares else 0.0
        return None if after is None or before is None else after - before


class TraitAccuracy(_TraitScore):
    """Share of coherent opinions in which a classifier sees the wished trait (Acc).

    The classifier is that of the protocol (``protocol.traits``); without one there is no such
    score.
    """

    name = "trait_acc"
    measurements = (PASSAGE, TRAIT_SHARES)
    is_share = True
    compares = False

    @classmethod
    def of(cls, probe: ProbeRecord, state: ProbeReading) -> float | None:
        """1 where no other trait is as likely, else 0."""
        shares = TRAIT_SHARES.of(state)
        if not shares:
            return None
        own = TRAITS.index(probe["task"]["label"])
        return float(all(shares[own] > share for at, share in enumerate(shares) if at != own))


class TraitShift(_TraitScore):
    """How much surer a classifier is of the wished trait after the edit than before it (TPEI).

    The cross-entropy of the trait before the edit less that after it, in nats, over coherent
    opinions; by ``protocol.traits``.
    """

    name = "tpei"
    value_range = "no bounds"
    measurements = (PASSAGE, TRAIT_SHARES)

    @classmethod
    def of(cls, probe: ProbeRecord, state: ProbeReading) -> float | None:
        """Log-probability of the trait."""
        shares = TRAIT_SHARES.of(state)
        own = TRAITS.index(probe["task"]["label"])
        return math.log(max(_LEAST, shares[own])) if shares else None


class AdjectiveShift(_TraitScore):
    """How much better adjectives of the wished trait fit after the edit than before it (PAE).

    The marks of a judge (``protocol.judge``), from 1 to 5, over coherent opinions; without a judge
    there is no such score.
    """

    name = "pae"
    value_range = "-4 to 4"
    measurements = (PASSAGE, RATING)

    @classmethod
    def of(cls, probe: ProbeRecord, state: ProbeReading) -> float | None:
        """The mark."""
        mark = RATING.of(state)
        return None if mark is None else float(mark)


TRAIT_SCORES: tuple[type[ProbeMean], ...] = (
    TraitCoherent,
    TraitAccuracy,
    TraitShift,
    AdjectiveShift,
)
