"""What the edits of a benchmark do to the rest of the model."""

from __future__ import annotations

import math
import warnings
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
from kedit_lightning.runs.saved_stack import apply_saved, first_edits


class AbilitySample(EditCallback):
    """Reads plain text and answers questions with choices under the edits of ``kedit test``.

    In sequential mode under all edits at the end, in the others under each of the first few edits
    alone; before that on the base model. ``ability_sample.json`` in the output folder has
    perplexity (geometric mean, and the worst edit's), divergence from the base model, and the share
    of right choices with what may be claimed of it. Where there is no edit it warns, and writes no
    file.

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
        #: Edits that stood on the stack before the run.
        self._initial: list[Edit] = []
        #: What was found.
        self.found: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the settings before anything is loaded.

        Raises:
            UnsupportedUseError: The run is no test, or a setting does not fit.
        """
        least = min(self.edits, 1 if self.questions is None else self.questions)
        if stage != "test" or least < 1 or not 0 < self.margin < 1:
            raise UnsupportedUseError(
                "AbilitySample needs `kedit test`, at least one edit to look at, at least one "
                f"question, and a margin between 0 and 1; got edits {self.edits}, questions "
                f"{self.questions} and margin {self.margin}"
            )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the edits of an earlier run."""
        self._kept, self.found = [], {}
        self._initial = list(as_edit_method(pl_module).base.edits)

    def on_edit(self, trainer: Trainer, method: LightningModule, name: str, edit: Edit) -> None:
        """Keep an edit that will be looked at, unless the stack has all of them in the end."""
        sequential = as_edit_method(method).run.protocol.grouping == "sequential"
        if not sequential and len(self._kept) < self.edits:
            self._kept.append(edit)

    def on_stream_checkpoint(self, trainer: Trainer, method: LightningModule, facts: int) -> None:
        """Keep the stack of a stream, also the edits that an interrupted run has computed."""
        stack = as_edit_method(method).base.edits
        self._kept = [edit for edit in stack if not any(edit is old for old in self._initial)]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the base model and the edited ones, and write what was found."""
        if not trainer.is_global_zero:
            return
        method = as_edit_method(pl_module)
        base, folder, stacks = method.base, output_of(method.run), self._stacks(method)
        self._kept, self._initial = [], []  # edits may be large, and the callback outlives the run
        if not stacks:
            warnings.warn(
                "AbilitySample found no edit to look at, so ability_sample.json is not written; "
                "start the run again in a new folder (--output), with the callback EditSaver",
                stacklevel=2,
            )
            return
        canary = Canary(base, passages_of(None, method.run.seed), self.batch_size)
        before, texts, answers = self._choices(base), [], []
        for stack in stacks:
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

    def _choices(self, base: BaseModel) -> DocumentScores:
        return ability_scores(base, [CHOICES_TASK], self.batch_size, self.questions)

    def _stacks(self, method: EditMethod) -> list[list[Edit]]:
        """The edits of each model that is looked at."""
        if method.run.protocol.grouping == "sequential":
            return [self._kept] if self._kept else []
        folder, edits = output_of(method.run), self._kept
        if folder is not None and folder.resumed:  # some were computed before
            edits = first_edits(folder.path, method.base, self.edits) or edits
        return [[edit] for edit in edits]


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
