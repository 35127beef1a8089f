"""Scores of edits from the records of scored examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.metrics.example_record import ExampleRecord, ProbeRecord, stage_prefix
from kedit_lightning.metrics.keyed import KeyedMetrics, SummaryRow
from kedit_lightning.metrics.scores.case_mean import (
    ANSWER_SCORES,
    LOCALITY_SCORES,
    CaseMean,
    Cases,
    CostMean,
    name_id,
)

_FORGET = "forget/"
_FINAL = "final/"
# Blocks of an example record whose numbers are costs. The last two differ from run to run.
COST_BLOCKS = ("edit", "timing", "memory")


def by_group(probes: Iterable[ProbeRecord]) -> dict[str, dict[str, list[ProbeRecord]]]:
    """Probes by kind and group, in the order of their first appearance.

    Args:
        probes: Records of one example.
    """
    kinds: dict[str, dict[str, list[ProbeRecord]]] = {}
    for probe in probes:
        kinds.setdefault(probe["kind"], {}).setdefault(probe["group"], []).append(probe)
    return kinds


class EditMetrics(KeyedMetrics):
    """Every score of a run, from plain records of its examples.

    Keys are ``{kind}/{metric}`` and, for a group with a name of its own,
    ``{kind}/{group}/{metric}``. A case's value of a group is the mean over its probes there, and
    ``{kind}/{metric}`` is the mean over the groups of a case, so a case counts once everywhere.
    Intervals draw whole subjects.

    - Rewrite, rephrase, portability: ``tf_tok``, ``tf_all``, ``p_new_gt_old``, ``gen_em``,
      ``gen_contains``, ``inflation``.
    - Locality: ``keep_text``, ``keep_top1``, ``kl`` (with ``kl/p95``), ``known``. All compare with
      the unedited base model.
    - Costs: ``edit/bytes``, ``timing/edit_seconds`` and whatever else the blocks ``edit``,
      ``timing`` and ``memory`` hold, each with ``/median`` and ``/p95``; once a case, from its
      first record that has them.

    Scores right after an edit have no prefix; those of later stages have ``final/`` or
    ``after_<n>/``. Where cases were scored both right after their edit and at the end,
    ``forget/{kind}/{metric}`` is the mean loss between the two over these cases, for metrics of
    which more is better. What no record holds has no key.

    Args:
        level: Coverage of the intervals.
        resamples: Draws of the bootstrap.
        seed: Seed of the draws.
        sync: Whether reading gathers the cases of all processes of a distributed run. All of them
            must then read together.
    """

    def __init__(
        self, level: float = 0.95, resamples: int = 10_000, seed: int = 0, sync: bool = True
    ) -> None:
        super().__init__(level, resamples, seed, sync)
        self._seen: set[tuple[str, str]] = set()
        self._costs_seen: set[tuple[str, str]] = set()

    def update(self, record: ExampleRecord) -> None:
        """Add one scored example.

        Args:
            record: Its record, as a line of ``results.jsonl`` holds it.

        Raises:
            InvalidRequestError: The stage is unknown, or the example was scored at it before.
        """
        prefix = stage_prefix(record)
        key = (record["stage"], record["id"])
        if key in self._seen:
            raise InvalidRequestError(
                f"example {record['id']!r} was scored at stage {record['stage']!r} before; "
                "give every example an id of its own, and reset the metrics between runs"
            )
        self._seen.add(key)
        for kind, groups in by_group(record["probes"]).items():
            for score in LOCALITY_SCORES if kind == "locality" else ANSWER_SCORES:
                values = {group: score.case_value(probes) for group, probes in groups.items()}
                known = {group: value for group, value in values.items() if value is not None}
                if not known:
                    continue
                overall = sum(known.values()) / len(known)
                self._add(record, f"{prefix}{kind}/{score.name}", score, overall)
                for group, value in known.items():
                    if group != kind:
                        self._add(record, f"{prefix}{kind}/{group}/{score.name}", score, value)
        self._add_costs(record)

    def _add(self, record: ExampleRecord, key: str, kind: type[CaseMean], value: float) -> None:
        case = name_id(record["id"])
        subject = record.get("subject")
        cluster = case if subject is None else name_id(subject)
        self.metric(key, kind).update([value], [cluster], [case])

    def _add_costs(self, record: ExampleRecord) -> None:
        blocks: dict[str, Mapping[str, float | None]] = {
            "edit": record.get("edit", {}),
            "timing": record.get("timing", {}),
            "memory": record.get("memory", {}),
        }
        for block, costs in blocks.items():
            for name, cost in costs.items():
                key = f"{block}/{name}"
                # True is an int to Python, but no cost.
                if isinstance(cost, bool) or not isinstance(cost, int | float):
                    continue
                if (key, record["id"]) not in self._costs_seen:
                    self._costs_seen.add((key, record["id"]))
                    self._add(record, key, CostMean, float(cost))

    def compute(self) -> dict[str, float]:
        """Mean over cases by key, with ``<key>/median`` and the like after it."""
        gathered = self.gathered()
        numbers = self.means(gathered)
        for key, (_, cases) in self._forgotten(gathered).items():
            numbers[key] = cases.values.mean().item()
        return numbers

    def summary(self) -> list[SummaryRow]:
        """Mean, bounds of the interval and number of cases, by key."""
        gathered = self.gathered()
        entries = {key: (metric.is_share, cases) for key, (metric, cases) in gathered.items()}
        return self.rows(entries | self._forgotten(gathered))

    def _forgotten(
        self, gathered: dict[str, tuple[CaseMean, Cases]]
    ) -> dict[str, tuple[bool, Cases]]:
        """Losses between the stages ``immediate`` and ``final`` of cases that were seen at both."""
        losses: dict[str, tuple[bool, Cases]] = {}
        for key, (metric, later) in gathered.items():
            first = gathered.get(key.removeprefix(_FINAL))
            if not key.startswith(_FINAL) or first is None or not metric.higher_is_better:
                continue
            _, earlier = first
            # Cases come sorted by id, each once.
            pairs = torch.isin(earlier.ids, later.ids), torch.isin(later.ids, earlier.ids)
            loss = earlier.values[pairs[0]] - later.values[pairs[1]]
            if len(loss):
                cases = Cases(loss, earlier.clusters[pairs[0]], earlier.ids[pairs[0]])
                losses[_FORGET + key.removeprefix(_FINAL)] = (False, cases)
        return losses

    def reset(self) -> None:
        """Forget all cases and keys."""
        super().reset()
        self._seen.clear()
        self._costs_seen.clear()
