"""Scores of edits from the records of scored examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kedit_lightning.metrics.example_record import ExampleRecord
from kedit_lightning.metrics.keyed_metrics import KeyedMetrics
from kedit_lightning.metrics.scores.answers import SQUAD_SCORES
from kedit_lightning.metrics.scores.case_mean import CaseMean, Cases, ProbeMean, ShareLoss
from kedit_lightning.metrics.scores.edit_cost import CostMean
from kedit_lightning.metrics.scores.generation_quality import SQUAD_GENERATION
from kedit_lightning.metrics.scores.tasks import SQUAD_TASKS
from kedit_lightning.registry import entries
from kedit_lightning.requests import ProbeKind

_FORGET = "forget/"
_FINAL = "final/"
# Blocks of an example record whose numbers are costs. The last two differ from run to run.
COST_BLOCKS = ("edit", "timing", "memory")


class EditMetrics(KeyedMetrics):
    """Every score of a run, from plain records of its examples.

    Keys are ``{kind}/{metric}`` and, for a group with a name of its own,
    ``{kind}/{group}/{metric}``. A case's value of a group is the mean over its probes there, and
    ``{kind}/{metric}`` is the mean over the groups of a case, so a case counts once everywhere.
    Intervals resample whole subjects.

    - Rewrite, rephrase, portability: ``tf_tok``, ``tf_all``, ``p_new_gt_old``, ``nll``, ``gen_em``,
      ``gen_contains``, ``gen_f1``, ``inflation``, ``runon``, ``repeat``; portability also
      ``gen_any`` and ``gen_all``.
    - Rewrite, of sampled text: ``ngram_entropy``, ``ngram_entropy_change``.
    - Locality: ``repeat``; ``perplexity`` of plain text; ``keep_text``, ``keep_top1``, ``kl`` (with
      ``kl/p95``) and ``known``, which compare with the unedited base model.
    - Tasks, of the datasets that have them: opinions ``tf_es``, ``gen_sentiment``; passages
      ``gen_bleu``, ``gen_rougel_f``, ``gen_rouge1``, ``gen_rouge2``, ``gen_rougel``,
      ``gen_cosine``, and on characters ``gen_char_rougel``; sanitation ``gen_forgotten``,
      ``gen_retained``; RippleEdits ``gen_test``; HalluEditBench ``gen_form``, ``gen_hop``,
      ``gen_robust``; multiple choice ``mc1``, ``mc2``, ``mc3``; safety ``ds``, ``dg``,
      ``ds_change``; concepts
      ``consistency_cosine``, ``consistency_judge``, and of their instances ``instance_change``,
      ``instance_to_no``, ``instance_to_yes``, ``instance_unparsed``, ``instance_shift``;
      personality ``tf_es``, ``trait_acc``, ``tpei``, ``pae``, ``trait_coherent``. With a
      judge ``gen_judge``.
    - Costs: ``edit/bytes``, ``timing/edit_seconds`` and whatever else the blocks ``edit``,
      ``timing`` and ``memory`` hold, each with ``/median`` and ``/p95``; once a case, from its
      first record that has them.
    - Metrics that a plug-in registered (``registry.Entry(kind="metric", …)``), under their names.

    Scores right after an edit have no prefix; those of later stages have ``final/`` or
    ``after_<n>/``. Where cases were scored both right after their edit and at the end,
    ``forget/{kind}/{metric}`` is the mean loss between the two over these cases, for metrics of
    which more is better. A score that no record holds has no key.
    """

    @classmethod
    def scores(cls) -> Sequence[type[ProbeMean]]:
        """The registered metrics."""
        return [entry.load() for entry in entries("metric").values()]

    def key(
        self, score: type[ProbeMean], stage: str, kind: ProbeKind, group: str | None
    ) -> str | None:
        """``{kind}/{metric}``, or ``{kind}/{group}/{metric}`` for a group with its own name."""
        if group is None:
            return f"{stage}{kind}/{score.name}"
        return None if group == kind else f"{stage}{kind}/{group}/{score.name}"

    def update(self, record: ExampleRecord) -> None:
        """Add the scores of an example, and its costs where no earlier stage had them."""
        super().update(record)
        fields: Mapping[str, Any] = record
        for block in COST_BLOCKS:
            for name, cost in fields.get(block, {}).items():
                key = f"{block}/{name}"
                # True is an int to Python, but no cost.
                number = isinstance(cost, int | float) and not isinstance(cost, bool)
                if number and (key, record["id"]) not in self.seen:
                    self.seen.add((key, record["id"]))
                    self.add(record, key, CostMean, float(cost))

    def gathered(self) -> dict[str, tuple[CaseMean, Cases]]:
        """Metrics with their cases from all processes, and the losses to the final stage."""
        gathered = super().gathered()
        losses: dict[str, tuple[CaseMean, Cases]] = {}
        for key, (metric, later) in gathered.items():
            first = gathered.get(key.removeprefix(_FINAL))
            if not key.startswith(_FINAL) or first is None or not metric.higher_is_better:
                continue
            earlier = first[1]
            # Cases come sorted by id, each once.
            pairs = torch.isin(earlier.ids, later.ids), torch.isin(later.ids, earlier.ids)
            loss = earlier.values[pairs[0]] - later.values[pairs[1]]
            if len(loss):
                cases = Cases(loss, earlier.clusters[pairs[0]], earlier.ids[pairs[0]])
                difference = (ShareLoss if metric.is_share else CaseMean)(
                    self.level, self.resamples, self.seed, sync_on_compute=False
                )
                losses[_FORGET + key.removeprefix(_FINAL)] = difference, cases
        return gathered | losses


class SquadMetrics(EditMetrics):
    """The scores of a run with free answers compared by the rule of SQuAD."""

    @classmethod
    def scores(cls) -> Sequence[type[ProbeMean]]:
        """The registered metrics, those of free answers by the rule of SQuAD."""
        rules = SQUAD_SCORES | SQUAD_GENERATION | SQUAD_TASKS
        return [rules.get(score, score) for score in super().scores()]
