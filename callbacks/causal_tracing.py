"""Causal traces of the prompts of ``predict``, as heat maps."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console

from kedit_lightning.analysis import figures
from kedit_lightning.analysis.causal_trace import Trace, TraceKind, trace
from kedit_lightning.benchmark import EditCallback
from kedit_lightning.errors import MissingNeedsError


class CausalTracing(EditCallback):
    """Traces each prompt of ``kedit predict``: which layer and token carry the fact.

    Writes a heat map (PNG) and its numbers (JSON) for each prompt, and names the layer that matters
    most at the subject's last token. The model is traced as it stands, edits included.

    Args:
        subject: Subject of the prompts; with ``--data`` each request's own if not given.
        answer: Text whose first token is measured; the model's own answer if not given.
        kind: Which states are restored: outputs of a whole ``block``, of its ``mlp``, or of its
            ``attention``.
        window: Layers restored together; one of blocks, a fifth of the depth else if not given.
        noise: Standard deviation of the noise, as a multiple of that of the subject's embeddings.
        samples: How often noise is drawn.
        seed: Seed of the noise.
        batch_size: Rows of a forward pass; it never changes a result.
        folder: Where pictures and numbers go.
    """

    def __init__(
        self,
        subject: str | None = None,
        answer: str | None = None,
        kind: TraceKind = "block",
        window: int | None = None,
        noise: float = 3.0,
        samples: int = 10,
        seed: int = 0,
        batch_size: int = 32,
        folder: str | Path = "traces",
    ) -> None:
        self.subject = subject
        self.folder = Path(folder)
        self._settings: dict[str, Any] = {
            "answer": answer,
            "kind": kind,
            "window": window,
            "noise": noise,
            "samples": samples,
            "seed": seed,
            "batch_size": batch_size,
        }

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Trace the prompts of a batch, before they are answered: a wrong subject shows at once."""
        base: Any = pl_module.base
        for prompt, subject in self._asked(batch):
            result = trace(base, prompt, subject, **self._settings)
            path = self._write(result, [*base.edits.ids])
            effect = float(result.effect[result.best_layer, result.subject[1]])
            Console().print(
                f"{prompt!r}: p({result.answer}) is {result.high:.3f}, and {result.low:.3f} with "
                f"noise on {subject!r}; at its last token layer {result.best_layer} brings back "
                f"most ({effect:+.3f}); {path}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def _asked(self, batch: Any) -> list[tuple[str, str]]:
        """Prompts with their subjects."""
        requests = getattr(batch, "requests", None)
        pairs = (
            [(prompt, self.subject) for prompt in batch.prompts]
            if requests is None
            else [(request.prompt, self.subject or request.subject) for request in requests]
        )
        missing = [prompt for prompt, subject in pairs if subject is None]
        if missing:
            raise MissingNeedsError(
                f"CausalTracing needs the subject of prompt {missing[0]!r}; add it with "
                "--trainer.callbacks.subject, or ask prompts of a dataset that names subjects"
            )
        return [(prompt, subject) for prompt, subject in pairs if subject is not None]

    def _write(self, result: Trace, edits: list[str]) -> Path:
        """Write figure and numbers, under a name that differs for other edits and settings."""
        content = [result.prompt, result.subject, edits, self._settings]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
        words = re.sub(r"[^a-z0-9]+", "-", result.prompt.lower()).strip("-")[:48]
        path = self.folder / f"{words or 'prompt'}-{result.kind}-{digest}.png"
        figures.draw_trace(result, path)
        text = json.dumps({**result.facts(), "edits": edits}, indent=2, ensure_ascii=False)
        path.with_suffix(".json").write_text(f"{text}\n", encoding="utf-8")
        return path
