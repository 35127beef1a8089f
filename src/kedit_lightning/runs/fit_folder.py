"""Where a fit leaves its checkpoints, and what is said about them when it ends."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from kedit_lightning.errors import ResumeError


class FitFolder:
    """Folder of a fit: checkpoints, the config that began it, and a picture of how it went.

    Args:
        root: The folder, unless a fit names another.
        callbacks: The callbacks of the trainer that write checkpoints.
    """

    def __init__(self, root: str | Path, callbacks: Sequence[Checkpoint]) -> None:
        self._root = self.path = Path(root)
        self._savers = [c for c in callbacks if isinstance(c, ModelCheckpoint)]
        #: Those that were given no folder.
        self._unplaced = [saver for saver in self._savers if saver.dirpath is None]
        #: The config of the command line, once it is saved.
        self.config: Path | None = None

    def open(self, output: str | Path | None, ckpt_path: str | Path | None, first: bool) -> None:
        """Let a fit write to ``output``, or else to the root, whatever its logger.

        Lightning's own choice follows the first logger, and not ``default_root_dir``.

        Args:
            output: The folder, which must be free.
            ckpt_path: The checkpoint that the fit continues, if it does.
            first: Whether this is the first process; others find what it has written.

        Raises:
            ResumeError: The folder has other results, or checkpoints that are not continued.
        """
        self.path, self.config = Path(output or self._root), None
        if output is not None and first:
            self._check_free(ckpt_path)
        for saver in self._unplaced:
            saver.dirpath = str(self.path / "checkpoints")

    def _check_free(self, ckpt_path: str | Path | None) -> None:
        if any((self.path / name).exists() for name in ("run.json", "results.jsonl")):
            raise ResumeError(
                f"{self.path} holds the results of a run of `kedit edit` or `kedit test`; name "
                "another folder for this fit with --output"
            )
        earlier = sorted((self.path / "checkpoints").glob("*.ckpt"))
        if earlier and ckpt_path is None:
            last = next((path for path in earlier if path.stem == "last"), earlier[0])
            raise ResumeError(
                f"{self.path} holds checkpoints of an earlier fit; continue it with --ckpt_path "
                f"{last}, or name another folder for this one with --output"
            )

    def note(self) -> str:
        """A line that names the best and the last checkpoint, and how one is tested.

        It is empty where nothing was saved.
        """
        judged = next((s for s in self._savers if s.monitor and s.best_model_path), None)
        # Without a monitor, the best checkpoint is the newest one.
        newest = next((s.best_model_path for s in self._savers if not s.monitor), "")
        newest = newest or (judged.last_model_path if judged else "")
        best = _readable(judged.best_model_path) if judged else ""
        named = [f"last checkpoint: {_readable(newest)}"] if newest else []
        if judged is not None:
            score = judged.best_model_score
            value = "" if score is None else f" ({judged.monitor} {float(score):.3f})"
            named.insert(0, f"best checkpoint: {best}{value}")
        if not named:
            return ""
        tested = best or _readable(newest)
        how = f'EditTrainer().test(method, data, ckpt_path="{tested}")'
        if self.config is not None:
            config = shlex.quote(_readable(str(self.config)))
            how = f"kedit test -c {config} --ckpt_path {shlex.quote(tested)}"
        return f"{', '.join(named)}; test it with: {how}"


def _readable(path: str) -> str:
    """A path from the working folder on, where it lies below that."""
    return os.path.relpath(path) if Path(path).resolve().is_relative_to(Path.cwd()) else path
