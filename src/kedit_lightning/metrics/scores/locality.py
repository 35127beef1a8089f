"""Locality: whether unrelated answers are still those of the base model."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning.metrics.example_record import ProbeRecord
from kedit_lightning.metrics.functional.divergence import unchanged_text
from kedit_lightning.metrics.measurement import KL, TEXT, TF_ALL, TOP1
from kedit_lightning.metrics.scores.case_mean import ProbeMean


class UnchangedText(ProbeMean):
    """Share of probes to which the edited model writes what the base model writes."""

    name = "keep_text"
    kinds = ("locality",)
    measurements = (TEXT,)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0: the text after the edit equals the base model's."""
        base, after = TEXT.of(probe["base"]), TEXT.of(probe["after"])
        return None if base is None or after is None else float(unchanged_text(base, after))


class UnchangedTop1(ProbeMean):
    """Share of probes whose arg-max is the base model's at every position of its continuation."""

    name = "keep_top1"
    kinds = ("locality",)
    measurements = (TOP1,)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0: the arg-max ids after the edit equal the base model's."""
        base, after = TOP1.of(probe["base"]), TOP1.of(probe["after"])
        return float(base == after) if base and after else None


class StillKnown(ProbeMean):
    """Share of answers still right among those that the base model had right."""

    name = "known"
    kinds = ("locality",)
    measurements = (TF_ALL,)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """1 or 0 after the edit where the base model was right, else ``None``."""
        return super().read(probe) if TF_ALL.of(probe["base"]) else None


class BaseKL(ProbeMean):
    """KL divergence from the base model, mean over positions, in nats."""

    name = "kl"
    value_range = "0 upwards"
    kinds = ("locality",)
    measurements = (KL,)
    higher_is_better = False

    def extras(self, values: Tensor) -> dict[str, float]:
        """95th percentile of the values ``[cases]``: damage to few cases, which a mean hides."""
        return {"p95": torch.quantile(values, 0.95).item()}


LOCALITY_SCORES: tuple[type[ProbeMean], ...] = (UnchangedText, UnchangedTop1, BaseKL, StillKnown)
