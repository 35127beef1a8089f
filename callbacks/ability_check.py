"""General ability of a model before and after its edits."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console

from kedit_lightning.analysis.ability import (
    DocumentScores,
    ability_scores,
    ability_table,
    changes,
    needs_harness,
)
from kedit_lightning.analysis.harness import harness
from kedit_lightning.benchmark import EditCallback
from kedit_lightning.edits import Edit
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.method import EditMethod, as_edit_method
from kedit_lightning.runs.output_folder import output_of
from kedit_lightning.runs.saved_stack import apply_saved, load_stack


class AbilityCheck(EditCallback):
    """Answers tasks of lm-evaluation-harness before and after the edits of a run.

    ``kedit edit`` and ``kedit test`` in sequential mode end with one stack of edits, under which
    the same documents are answered again; scores are paired document by document. A table says of
    each task whether a loss beyond the margin is ruled out. With an output folder it writes
    ``ability.json``, from which a resumed run takes the scores it has.

    Args:
        tasks: Names of tasks, ``nano_choices`` among them, which needs no harness, and YAML files
            of your own.
        limit: Documents of each task, the first ones; all if not given.
        margin: Loss of a share that would not matter; 0.01 is one point of a hundred.
        batch_size: Rows of a forward pass.
        console: Where the table is shown; the terminal if not given.
    """

    def __init__(
        self,
        tasks: list[str],
        limit: int | None = None,
        margin: float = 0.01,
        batch_size: int = 16,
        console: Console | None = None,
    ) -> None:
        self.tasks, self.limit, self.margin = tasks, limit, margin
        self.batch_size, self.console = batch_size, console or Console()
        self._edits: dict[str, Edit] = {}
        self._before: DocumentScores = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before anything is loaded that there will be one edited model.

        Raises:
            UnsupportedUseError: The run ends with no stack of edits, or a setting does not fit.
            MissingExtraError: lm-evaluation-harness is not installed.
        """
        run = as_edit_method(pl_module).run
        if stage != "test" or not (run.editing or run.protocol.grouping == "sequential"):
            raise UnsupportedUseError(
                "general ability is that of one edited model: use --ability with `kedit edit`, or "
                "with `kedit test` and --trainer.protocol.mode sequential"
            )
        least = len(self.tasks) if self.limit is None else min(len(self.tasks), self.limit)
        if least < 1 or not 0 < self.margin < 1:
            raise UnsupportedUseError(
                "AbilityCheck needs at least one task (--ability TASK,TASK), at least one document "
                f"of each, and a margin between 0 and 1; got tasks {self.tasks}, limit "
                f"{self.limit} and margin {self.margin}"
            )
        if needs_harness(self.tasks):
            harness()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer the tasks with the base model, so that a wrong name shows before any edit."""
        self._edits = {}
        if trainer.is_global_zero:
            method = as_edit_method(pl_module)
            self._before = self._saved(method).get("before") or self._scores(method)

    def on_edit(self, trainer: Trainer, method: LightningModule, name: str, edit: Edit) -> None:
        """Keep an edit where no folder does."""
        if output_of(as_edit_method(method).run) is None:
            self._edits[name] = edit

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer them again under all edits, and say what may be claimed."""
        if not trainer.is_global_zero:
            return
        method = as_edit_method(pl_module)
        folder, base = output_of(method.run), method.base
        edits = list(self._edits.values())
        edits = edits if folder is None else load_stack(folder.path, base)
        saved = self._saved(method)
        if saved.get("edits") == [edit.id for edit in edits]:
            after = saved["after"]
        else:
            with base.edits.restored():
                apply_saved(edits)
                after = self._scores(method)
        rows = changes(self._before, after, self.margin, method.run.seed)
        if folder is not None:
            content = {
                **self._asked,
                "edits": [edit.id for edit in edits],
                "changes": [asdict(row) | {"not_inferior": row.not_inferior} for row in rows],
                "before": _plain(self._before),
                "after": _plain(after),
            }
            folder.write_json("ability.json", content)
        self.console.print(ability_table(rows))

    @property
    def _asked(self) -> dict[str, Any]:
        """What scores depend on, beside the model."""
        return {"tasks": self.tasks, "limit": self.limit}

    def _scores(self, method: EditMethod) -> DocumentScores:
        return ability_scores(method.base, self.tasks, self.batch_size, self.limit)

    def _saved(self, method: EditMethod) -> dict[str, Any]:
        """Scores that an earlier end of this run has written, if it asked the same."""
        folder = output_of(method.run)
        if folder is None or not folder.resumed or not (folder.path / "ability.json").is_file():
            return {}
        found = json.loads((folder.path / "ability.json").read_text(encoding="utf-8"))
        if any(found.get(name) != value for name, value in self._asked.items()):
            return {}
        for state in ("before", "after"):
            found[state] = {(entry["task"], entry["metric"]): entry["scores"]
                            for entry in found[state]}  # fmt: skip
        return dict(found)


def _plain(scores: DocumentScores) -> list[dict[str, Any]]:
    return [{"task": task, "metric": metric, "scores": values}
            for (task, metric), values in scores.items()]  # fmt: skip
