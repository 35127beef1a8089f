"""Figures; their modules, and matplotlib with them, are imported at the first use."""

from kedit_lightning.registry import lazy_exports

__all__ = ["draw_comparison", "draw_retention", "draw_trace", "draw_training"]

__getattr__ = lazy_exports(
    None,
    {
        "draw_comparison": "kedit_lightning.analysis.figures.comparison_figure",
        "draw_retention": "kedit_lightning.analysis.figures.retention_figure",
        "draw_trace": "kedit_lightning.analysis.figures.causal_trace_figure",
        "draw_training": "kedit_lightning.analysis.figures.training_figure",
    },
)
