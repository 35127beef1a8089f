"""Stops a stream of edits before it ruins the model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal, NoReturn

from lightning.pytorch import LightningModule, Trainer

from kedit_lightning.benchmark import EditCallback
from kedit_lightning.benchmark.health import Bounds, HealthMonitor
from kedit_lightning.data.plain_text import passages_of
from kedit_lightning.edits import Edit
from kedit_lightning.errors import StreamStopped, UnsupportedUseError
from kedit_lightning.methods.method import EditMethod, as_edit_method
from kedit_lightning.runs.output_folder import output_of
from kedit_lightning.runs.results import tell

_WAYS_OUT = (
    "try larger chunks with a method that writes many facts at once (MEMIT, AlphaEdit), fewer "
    "facts, or a memory (GRACE, WISE)"
)


class CanaryGuard(EditCallback):
    """Reads the health of the model under each new edit before the edit is kept.

    It watches perplexity and divergence on the same passages, norms of the edited weights, a sample
    of the facts that were written before, and values that are not finite. The edit with which a
    bound is crossed is kept with a warning (`warn`), is the last one that is kept (`stop`), or is
    not kept (`rollback`): then the model, and what is saved, is that of the last healthy point. In
    one batch there is no earlier point, so `stop` and `rollback` refuse the whole edit. With an
    output folder it writes `canary.jsonl`, a line for each edit.

    Args:
        action: What happens when a bound is crossed: `warn`, `stop` or `rollback`.
        perplexity: The most that the perplexity may be, as a multiple of the base model's.
        kl: The most that the mean divergence from the base model may be, in nats a token.
        norm: The most that the norm of a weight may be, as a multiple of the base model's.
        facts: The least share of old facts that must still hold.
        sample: Old facts that are asked.
        text: Text file with a passage a line; packaged passages if not given.
        passages: Passages that are read, the first ones.
    """

    def __init__(
        self,
        action: Literal["warn", "stop", "rollback"] = "warn",
        perplexity: float | None = 1.5,
        kl: float | None = None,
        norm: float | None = None,
        facts: float | None = 0.5,
        sample: int = 16,
        text: str | Path | None = None,
        passages: int = 16,
    ) -> None:
        self.action = action
        self.bounds = Bounds(perplexity, kl, norm, facts)
        self.sample, self.text, self.passages = sample, text, passages
        #: What was found, edit by edit.
        self.checks: list[dict[str, Any]] = []
        self._stopped = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before anything is loaded that there is something to guard.

        Raises:
            UnsupportedUseError: The run applies no edits for use, or a setting does not fit.
        """
        run = as_edit_method(pl_module).run
        if stage != "test" or not (run.editing or run.protocol.grouping == "sequential"):
            raise UnsupportedUseError(
                "the canary watches edits that stay: use it with `kedit edit`, or with `kedit "
                "test` and --trainer.protocol.mode sequential"
            )
        if self.passages < 1 or self.sample < 0:
            raise UnsupportedUseError(
                "CanaryGuard needs at least one passage and no negative sample, got passages "
                f"{self.passages} and sample {self.sample}"
            )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the base model; a resumed run goes on from its file."""
        method = as_edit_method(pl_module)
        self.checks, self._stopped = [], ""
        path = None if self.text is None else Path(self.text).expanduser()
        passages = passages_of(path, method.run.seed)[: self.passages]
        size = method.run.protocol.score_batch_size
        with method.base.edits.suspended():
            self._monitor = HealthMonitor(
                method.base, passages, self.bounds, self.sample, method.run.seed, size
            )
        folder = output_of(method.run)
        if (
            folder is not None
            and folder.resumed
            and (file := folder.path / "canary.jsonl").is_file()
        ):
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            self.checks = [json.loads(line) for line in lines if line.endswith("\n")]

    def on_computed_edit(
        self, trainer: Trainer, method: LightningModule, name: str, edit: Edit
    ) -> None:
        """Read the model under a new edit, and decide.

        Raises:
            StreamStopped: A bound is crossed, and the action is not to warn.
        """
        # Where a run that had ended with an edit goes on, or a ledger with such edits.
        if (last := self._last_kept(as_edit_method(method))) is not None and last["edit"] != name:
            self._stop(last, keeps=False)
        health = self._monitor.read(edit)
        broken = health.broken(self.bounds)
        first = broken and not any(check["broken"] for check in self.checks)
        check = {"edit": name, **health._asdict(), "broken": broken}
        self._write(as_edit_method(method), check)
        if broken and self.action != "warn":
            self._stop(check, keeps=self.action == "stop")
        if first:
            warnings.warn(f"canary: {_described(check)}; {_WAYS_OUT}", stacklevel=2)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why the run has ended early."""
        if self._stopped:
            tell(self._stopped)

    def _last_kept(self, method: EditMethod) -> dict[str, Any] | None:
        """The check of the edit that is the last one, once a bound was crossed with it."""
        if self.action != "stop":
            return None
        checks, standing = self.checks, method.base.edits.ids
        if standing and not checks:  # a ledger keeps none
            checks = [{"edit": standing[-1], "broken": self._monitor.read().broken(self.bounds)}]
        return next((check for check in checks if check["broken"]), None)

    def _stop(self, check: dict[str, Any], keeps: bool) -> NoReturn:
        """End the stream on account of a check, with or without the edit that is computed now."""
        end = "it is the last one" if self.action == "stop" else "it was rolled back"
        self._stopped = f"stopped by the canary: {_described(check)}; {end}; {_WAYS_OUT}"
        raise StreamStopped(self._stopped, keeps)

    def _write(self, method: Any, check: dict[str, Any]) -> None:
        known = any(other["edit"] == check["edit"] for other in self.checks)
        folder = output_of(method.run)
        if known:  # computed again after an interruption
            return
        self.checks.append(check)
        if folder is not None:
            with (folder.path / "canary.jsonl").open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(check)}\n")


def _described(check: dict[str, Any]) -> str:
    return f"under edit '{check['edit']}' {' and '.join(check['broken'])}"
