"""Figures; their modules, and matplotlib with them, are imported at the first use."""

from __future__ import annotations

from typing import Any

from kedit_lightning.registry import lazy_exports

__all__ = ["draw_trace", "draw_training"]

_get = lazy_exports(
    None,
    {
        "draw_trace": "kedit_lightning.analysis.figures.causal_trace_figure",
        "draw_training": "kedit_lightning.analysis.figures.training_figure",
    },
)


def __getattr__(name: str) -> Any:
    return _get(name)
