"""What the edits of a benchmark do to the rest of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from statistics import fmean
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from kedit_lightning.analysis.ability import DocumentScores, ability_scores, changes
from kedit_lightning.analysis.known_choices import CHOICES_TASK
from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark import EditCallback
from kedit_lightning.benchmark.canary import Canary
from kedit_lightning.data.plain_text import passages_of
from kedit_lightning.edits import Edit
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.method import EditMethod, as_edit_method
from kedit_lightning.runs.output_folder import output_of
from kedit_lightning.runs.saved_stack import apply_saved, load_stack


class AbilitySample(EditCallback):
    """Reads plain text and answers questions with choices under the edits of ``kedit test``.

    In sequential mode under all edits at the end, in the others under each of the first few edits
    alone; before that on the base model. ``ability_sample.json`` in the output folder has
    perplexity (geometric mean, and the worst edit's), divergence from the base model, and the share
    of right choices with what may be claimed of it.

    Args:
        edits: Edits that are looked at in single and batch mode, the first ones.
        questions: Questions with choices, the first ones; all of them if not given.
        margin: Loss of a share of right choices that would not matter.
        batch_size: Rows of a forward pass.
    """

    def __init__(
        self,
        edits: int = 3,
        questions: int | None = None,
        margin: float = 0.05,
        batch_size: int = 32,
    ) -> None:
        self.edits, self.questions, self.margin = edits, questions, margin
        self.batch_size = batch_size
        self._kept: list[Edit] = []
        #: What was found.
        self.found: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the settings before anything is loaded.

        Raises:
            UnsupportedUseError: The run is no test, or a setting does not fit.
        """
        if stage != "test" or self.edits < 1 or not 0 < self.margin < 1:
            raise UnsupportedUseError(
                "AbilitySample needs `kedit test`, at least one edit to look at and a margin "
                f"between 0 and 1; got edits {self.edits} and margin {self.margin}"
            )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the edits of an earlier run."""
        self._kept, self.found = [], {}

    def on_edit(self, trainer: Trainer, method: LightningModule, name: str, edit: Edit) -> None:
        """Keep an edit that will be looked at."""
        if self._all(method) or len(self._kept) < self.edits:
            self._kept.append(edit)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the base model and the edited ones, and write what was found."""
        if not trainer.is_global_zero:
            return
        method = as_edit_method(pl_module)
        base, folder = method.base, output_of(method.run)
        canary = Canary(base, passages_of(None, method.run.seed), self.batch_size)
        before, texts, answers = self._choices(base), [], []
        for stack in self._stacks(method):
            with _under(base, stack):
                texts.append(canary.measure())
                answers.append(self._choices(base))
        (change,) = changes(before, _mean(answers), self.margin, method.run.seed)
        logs = [math.log(text["perplexity"]) for text in texts]
        self.found = {
            "edited_models": len(texts),
            "perplexity": {
                "before": canary.base_perplexity(),
                "after": math.exp(min(fmean(logs), 700.0)),
                "worst": max(text["perplexity"] for text in texts),
            },
            "kl": fmean(text["kl"] for text in texts),
            "choices": asdict(change) | {"not_inferior": change.not_inferior},
        }
        if folder is not None:
            folder.write_json("ability_sample.json", self.found)

    def _all(self, method: LightningModule) -> bool:
        return as_edit_method(method).run.protocol.grouping == "sequential"

    def _choices(self, base: BaseModel) -> DocumentScores:
        return ability_scores(base, [CHOICES_TASK], self.batch_size, self.questions)

    def _stacks(self, method: EditMethod) -> list[list[Edit]]:
        """The edits of each model that is looked at."""
        folder = output_of(method.run)
        edits = self._kept
        if folder is not None and folder.resumed:  # some were computed before
            edits = load_stack(folder.path, method.base)
        return [edits] if self._all(method) else [[edit] for edit in edits[: self.edits]]


@contextmanager
def _under(base: BaseModel, edits: Sequence[Edit]) -> Iterator[None]:
    with base.edits.restored():
        apply_saved(edits)
        yield


def _mean(answers: Sequence[DocumentScores]) -> DocumentScores:
    """The mean score of each document over several models."""
    return {
        key: {doc: fmean(one[key][doc] for one in answers) for doc in scores}
        for key, scores in answers[0].items()
    }
