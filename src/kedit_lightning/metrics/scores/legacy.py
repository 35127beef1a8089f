"""Scores under EasyEdit's names and definitions, for comparison with published numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.metrics.edit_metrics import by_group
from kedit_lightning.metrics.example_record import (
    ExampleRecord,
    ProbeReading,
    ProbeRecord,
    stage_prefix,
)
from kedit_lightning.metrics.functional import legacy_easyedit
from kedit_lightning.metrics.keyed import KeyedMetrics
from kedit_lightning.metrics.scores.case_mean import CaseMean, name_id


class LegacyMean(CaseMean):
    """Mean over samples of a share."""

    is_share = True


def _shares(probes: Iterable[ProbeRecord], state: str) -> list[float]:
    """Token match of each prompt before (``base``) or after the edit, empty targets dropped."""
    readings: list[ProbeReading] = [
        probe["base"] if state == "base" else probe["after"] for probe in probes
    ]
    shares = [reading.get("tf_tok") for reading in readings]
    return [share for share in shares if share is not None and share == share]


def _unchanged(probes: Iterable[ProbeRecord]) -> list[float]:
    """Share of unchanged positions of each prompt."""
    shares: list[float] = []
    for probe in probes:
        before, after = probe["base"].get("top1"), probe["after"].get("top1")
        if before is None or after is None:
            continue
        if len(before) != len(after):
            raise InvalidRequestError(
                f"locality probe {probe['prompt']!r}: field 'top1' must hold equally many ids "
                f"before and after, got {len(before)} and {len(after)}"
            )
        pair = torch.tensor([before]), torch.tensor([after])
        shares += legacy_easyedit.rewrite_acc(pair[1], pair[0], torch.ones_like(pair[0]))
    return shares


class LegacyEasyEdit(KeyedMetrics):
    """What EasyEdit calls ``rewrite_acc``, ``rephrase_acc``, ``locality`` and ``portability``.

    Keys: ``rewrite_acc``, ``rephrase_acc``, ``locality/{group}_acc``,
    ``portability/{group}_acc``; ``locality`` and ``portability`` are the mean over samples of the
    mean over a sample's groups, as its KnowEdit script sums up. ``pre/`` stands before the scores
    of the unedited base model (locality has none), ``final/`` and ``after_<n>/`` before those of
    later stages. Each is the mean over samples of a sample's mean over prompts.

    Args:
        level: Coverage of the intervals.
        resamples: Draws of the bootstrap.
        seed: Seed of the draws.
        sync: Whether reading gathers the cases of all processes of a distributed run.
    """

    def update(self, record: ExampleRecord) -> None:
        """Add one scored example.

        Args:
            record: Its record, as a line of ``results.jsonl`` holds it.

        Raises:
            InvalidRequestError: The stage is unknown, or arg-max ids before and after an edit
                differ in number.
        """
        prefix = stage_prefix(record)
        for kind, groups in by_group(record["probes"]).items():
            if kind in ("rewrite", "rephrase"):
                probes = [probe for group in groups.values() for probe in group]
                self._add(record, f"{prefix}{kind}_acc", _shares(probes, "after"))
                if not prefix:
                    self._add(record, f"pre/{kind}_acc", _shares(probes, "base"))
            elif kind == "locality":
                self._add_groups(
                    record,
                    prefix + kind,
                    {group: _unchanged(probes) for group, probes in groups.items()},
                )
            else:
                after = {group: _shares(probes, "after") for group, probes in groups.items()}
                self._add_groups(record, prefix + kind, after)
                if not prefix:
                    base = {group: _shares(probes, "base") for group, probes in groups.items()}
                    self._add_groups(record, f"pre/{kind}", base)

    def _add_groups(self, record: ExampleRecord, key: str, groups: dict[str, list[float]]) -> None:
        means = [sum(shares) / len(shares) for shares in groups.values() if shares]
        self._add(record, key, means)
        for group, shares in groups.items():
            self._add(record, f"{key}/{group}_acc", shares)

    def _add(self, record: ExampleRecord, key: str, shares: list[float]) -> None:
        if shares:
            case = name_id(record["id"])
            subject = record.get("subject")
            cluster = case if subject is None else name_id(subject)
            mean = sum(shares) / len(shares)
            self.metric(key, LegacyMean).update([mean], [cluster], [case])
