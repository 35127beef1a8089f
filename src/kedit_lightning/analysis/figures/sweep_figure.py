"""The picture of a sweep: its scores in the order of its trials, and against each setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Without pyplot there is no window and no global state, and a notebook keeps its own backend.
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kedit_lightning.analysis.search_space import Range, SearchSpace
from kedit_lightning.analysis.sweep_outcome import Outcome, best_of

_INK, _MUTED, _BEST = "#22303c", "#6b7885", "#c2410c"


def draw_sweep(
    outcomes: Sequence[Outcome], space: SearchSpace, objective: str, direction: str, path: Path
) -> Path:
    """Draw a panel for the trials in their order, and one for each setting.

    Complete trials are dots, pruned ones (with their score so far) rings, failed ones crosses at
    the foot; the best is marked. Returns the path of the PNG.
    """
    best = best_of(outcomes, direction)
    columns = 2 if len(space) == 3 else min(3, len(space) + 1)
    rows = -(-(len(space) + 1) // columns)
    with style.context("default"):
        figure = Figure(figsize=(3.4 * columns, 2.7 * rows), dpi=120, layout="constrained")
        axes = figure.add_subplot(rows, columns, 1)
        _points(axes, outcomes, [one.number for one in outcomes], best)
        _finish(axes, "trial", objective)
        for place, (name, part) in enumerate(space.items(), 2):
            axes = figure.add_subplot(rows, columns, place)
            if isinstance(part, Range):
                having = [one for one in outcomes if name in one.params]
                _points(axes, having, [one.params[name] for one in having], best)
                if part.log:
                    axes.set_xscale("log")
                axes.set_xlim(*_limits(part))
            else:
                labels = sorted({str(one.params[name]) for one in outcomes if name in one.params})
                having = [one for one in outcomes if name in one.params]
                places = [labels.index(str(one.params[name])) for one in having]
                _points(axes, having, places, best)
                axes.set_xticks(range(len(labels)), [label[:14] for label in labels])
                axes.set_xlim(-0.5, max(len(labels), 1) - 0.5)
            _finish(axes, name, "")
        figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})
    return path


def _limits(part: Range) -> tuple[float, float]:
    """Bounds of an axis, a little beyond those of a range."""
    if part.log:
        margin = (part.high / part.low) ** 0.05
        return part.low / margin, part.high * margin
    margin = 0.05 * (part.high - part.low)
    return part.low - margin, part.high + margin


def _points(
    axes: Axes, outcomes: Sequence[Outcome], places: Sequence[Any], best: Outcome | None
) -> None:
    looks = {"complete": "C0", "pruned": "none"}
    for state, colour in looks.items():
        found = [
            (place, one.value)
            for place, one in zip(places, outcomes, strict=True)
            if one.state == state and one.value is not None
        ]
        if found:
            x, y = zip(*found, strict=True)
            axes.scatter(x, y, s=22, facecolors=colour, edgecolors="C0", label=state)
    failed = [p for p, one in zip(places, outcomes, strict=True) if one.state in ("failed", "lost")]
    if failed:
        foot = axes.get_xaxis_transform()
        axes.scatter(
            failed, [0.02] * len(failed), s=22, marker="x", color=_MUTED, transform=foot,
            clip_on=False, label="failed",
        )  # fmt: skip
    for place, one in zip(places, outcomes, strict=True):
        if one is best and one.value is not None:
            axes.scatter([place], [one.value], s=80, facecolors="none", edgecolors=_BEST, lw=1.6)


def _finish(axes: Axes, below: str, beside: str) -> None:
    axes.set_xlabel(below, fontsize=8, color=_INK, parse_math=False)
    axes.set_ylabel(beside, fontsize=8, color=_INK, parse_math=False)
    axes.tick_params(labelsize=7, colors=_MUTED)
    axes.grid(color="#e6e9ec", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if beside and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)
