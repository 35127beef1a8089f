"""One pass over text that collects the keys of many layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.taps import capture, stop_after
from kedit_lightning.edits.modules import projection_shape
from kedit_lightning.statistics.moments import SecondMoment


class KeyCollector:
    """Accumulates second moments of the inputs of modules, all in one forward pass a batch.

    Args:
        base: The base model; its edits are suspended while it reads.
        modules: Names of the modules, in the order they run.
        max_tokens: Longest row; the rest of a text is cut off.
    """

    def __init__(self, base: BaseModel, modules: Sequence[str], max_tokens: int = 512) -> None:
        self.base = base
        self.modules = tuple(modules)
        self.max_tokens = min(max_tokens, base.max_tokens)
        self.moments = {
            name: SecondMoment.empty(projection_shape(base.module(name))[0])
            for name in self.modules
        }

    @torch.no_grad()
    def read(self, texts: Iterable[str]) -> None:
        """Add the keys at every token of the texts."""
        encoded = [self.base.encoder.encode(text) for text in texts if text.strip()]
        rows = [type(row)(row.prompt[: self.max_tokens], ()) for row in encoded]
        if not rows:
            return
        batch = self.base.pad(rows)
        with (
            self.base.edits.suspended(),
            capture(self.base.model, self.modules) as seen,
            stop_after(self.base.model, self.modules[-1]),
        ):
            self.base.forward(batch)
        mask = batch.attention_mask.bool()
        for name in self.modules:
            keys = seen.inputs[name]
            kept = keys[mask.to(keys.device)].float() if keys.dtype != torch.float64 else keys[mask]
            self.moments[name] = self.moments[name].updated(kept.cpu())

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return self.moments[self.modules[0]].count
