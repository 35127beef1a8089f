"""Scores under EasyEdit's names and definitions, for comparison with published numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.metrics.example_record import ExampleRecord, ProbeRecord
from kedit_lightning.metrics.functional.teacher_forcing import token_match
from kedit_lightning.metrics.keyed_metrics import KeyedMetrics, ProbeGroups
from kedit_lightning.metrics.measurement import ANSWER_TOP1, ROW_TOP1, ROW_TOP10, TF_TOK
from kedit_lightning.metrics.scores.case_mean import ProbeMean
from kedit_lightning.requests import ProbeKind


class LegacyMatch(ProbeMean):
    """Token match of the answer after the edit; an empty answer does not count."""

    name = "acc"
    measurements = (TF_TOK,)
    is_share = True
    #: Reading of the record that is scored.
    state: ClassVar[Literal["base", "after"]] = "after"

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """Share of the answer's tokens, ``None`` for an empty answer (NaN)."""
        share = TF_TOK.of(probe[cls.state])
        return None if share is None or share != share else float(share)


class LegacyBaseMatch(LegacyMatch):
    """The same of the unedited base model."""

    state = "base"


class LegacyLocality(ProbeMean):
    """Share of the answer's positions whose arg-max the edit left unchanged."""

    name = "acc"
    kinds = ("locality",)
    measurements = (ANSWER_TOP1,)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """Share of positions, ``None`` for an empty answer."""
        before, after = ANSWER_TOP1.of(probe["base"]), ANSWER_TOP1.of(probe["after"])
        if not before or after is None:
            return None
        if len(before) != len(after):
            raise InvalidRequestError(
                f"locality probe {probe['prompt']!r}: field 'top1' must hold equally many ids "
                f"before and after, got {len(before)} and {len(after)}"
            )
        ids = torch.tensor([before])
        return token_match(torch.tensor([after]), ids, torch.ones_like(ids)).item()


class LegacyRowTop1(ProbeMean):
    """Share of all positions, the prompt's too, whose arg-max the edit left unchanged (T-Loc)."""

    name = "top1"
    kinds = ("locality",)
    tasks = ("picture",)
    measurements = (ROW_TOP1,)
    is_share = True


class LegacyRowTop10(ProbeMean):
    """Share of all positions and ranks at which the ten likeliest tokens are the same (M-Loc).

    Ranks below the first change with the last bits of logits, as another dtype has them.
    """

    name = "top10"
    kinds = ("locality",)
    tasks = ("picture",)
    measurements = (ROW_TOP10,)
    is_share = True


class LegacyEasyEdit(KeyedMetrics):
    """EasyEdit's ``rewrite_acc``, ``rephrase_acc``, ``locality`` and ``portability``.

    Keys: ``rewrite_acc``, ``rephrase_acc``, ``locality/{group}_acc``,
    ``portability/{group}_acc``; ``locality`` and ``portability`` are the mean over samples of the
    mean over a sample's groups, as its KnowEdit script sums up. Of facts about pictures
    ``locality/{group}_top1`` and ``locality/{group}_top10`` compare all positions, as its
    multimodal scripts do. ``pre/`` stands before the scores
    of the unedited base model (locality has none), ``final/`` and ``after_<n>/`` before those of
    later stages. Each is the mean over samples of a sample's mean over prompts.
    """

    @classmethod
    def scores(cls) -> Sequence[type[ProbeMean]]:
        """EasyEdit's scores; registered metrics play no part."""
        return LegacyMatch, LegacyBaseMatch, LegacyLocality, LegacyRowTop1, LegacyRowTop10

    def groups(self, record: ExampleRecord) -> ProbeGroups:
        """Probes by kind and group; rewrites, and rephrases, are one group each."""
        kinds = super().groups(record)
        for kind in kinds.keys() & {"rewrite", "rephrase"}:
            kinds[kind] = {kind: [probe for group in kinds[kind].values() for probe in group]}
        return kinds

    def key(
        self, score: type[ProbeMean], stage: str, kind: ProbeKind, group: str | None
    ) -> str | None:
        """``{kind}_acc``, or ``{kind}`` and ``{kind}/{group}_acc`` where there are groups."""
        if score is LegacyBaseMatch and stage:
            return None
        stage = "pre/" if score is LegacyBaseMatch else stage
        if kind in ("rewrite", "rephrase"):
            return f"{stage}{kind}_acc" if group is None else None
        if score in (LegacyRowTop1, LegacyRowTop10):
            return None if group is None else f"{stage}{kind}/{group}_{score.name}"
        return f"{stage}{kind}" if group is None else f"{stage}{kind}/{group}_acc"
