"""The picture of what streams of edits keep, a line for each run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Without pyplot there is no window and no global state, and a notebook keeps its own backend.
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter, SymmetricalLogLocator

from kedit_lightning.analysis.comparison import Run

_INK, _MUTED = "#22303c", "#6b7885"
#: Panels side by side.
_COLUMNS = 3
#: Panels of all facts written so far: a title, and the scores of which the first is drawn that runs
#: have.
_PANELS = {
    "written": ("rewrite/gen_em", "rewrite/tf_all"),
    "in other words": ("rephrase/gen_em", "rephrase/tf_all"),
    "kept elsewhere": ("locality/known", "locality/keep_top1"),
}


class Curve(NamedTuple):
    """Points of a line, with the bounds of their intervals."""

    label: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


def draw_retention(runs: Sequence[Run], path: str | Path) -> Path | None:
    """Draw scores by the number of edits, and by the number of edits since; ``None`` without any.

    The first panels ask all facts written so far at each checkpoint; the next one shows how a
    fact fares as others are written after it. Bands are 95% intervals. A dotted line marks where
    a run's composite score has fallen below 60% of what it was. Where all runs followed their
    drift, the last panel has the perplexity of plain text. Returns the path of the PNG.
    """
    shown = [run for run in runs if run.facts.get("retention")]
    if not shown:
        return None
    panels = {
        f"{title}: {key}": [_by_edits(run, key) for run in shown]
        for title, keys in _PANELS.items()
        if (key := next((key for key in keys if _has(shown, key)), None)) is not None
    }
    key = next((key for key in _PANELS["written"] if _has(shown, key)), None)
    if key is not None:
        panels[f"by age: {key}"] = [_by_age(run, key) for run in shown]
    if all(run.drift for run in shown):
        panels["plain text: perplexity"] = [_perplexity(run) for run in shown]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with style.context("default"):
        columns = min(_COLUMNS, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(3.4 * columns, 2.9 * rows), dpi=150, layout="constrained")
        for place, (title, curves) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(rows, columns, place)
            aged = title.startswith("by age")
            _draw(axes, curves, title, "facts written since" if aged else "facts written")
            if not title.startswith("plain text"):
                axes.set_ylim(-0.03, 1.03)
            elif max(y for curve in curves for y in curve.y) > 10 * curves[0].y[0]:
                axes.set_yscale("log")
            for line, run in enumerate(shown):
                at = None if aged else run.facts["retention"]["collapse"]["at"]
                if at is not None:
                    axes.axvline(at, color=f"C{line % 10}", ls=":", lw=1)
        axes.legend(fontsize=7, frameon=False)
        figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})
    return path


def _has(runs: Sequence[Run], key: str) -> bool:
    return all(key in run.facts["retention"]["scores"] for run in runs)


def _by_edits(run: Run, key: str) -> Curve:
    """A score of all facts written so far, at each checkpoint."""
    last, points = run.facts["retention"]["checkpoints"][-1], {}
    for whole, row in run.scores.items():
        if (stage := whole.removesuffix(f"/{key}")) == whole:
            continue
        if stage == "final":
            points[last] = row
        elif found := re.fullmatch(r"after_(\d+)", stage):
            points[int(found[1])] = row
    rows = [points[at] for at in sorted(points)]
    return Curve(
        run.label,
        [float(at) for at in sorted(points)],
        [row.mean for row in rows],
        [row.low for row in rows],
        [row.high for row in rows],
    )


def _by_age(run: Run, key: str) -> Curve:
    """A score by the number of facts written since, each bin at its last age."""
    bins: list[dict[str, Any]] = run.facts["retention"]["scores"][key]["age"]
    columns = ([float(bin[name]) for bin in bins] for name in ("to", "mean", "low", "high"))
    return Curve(run.label, *columns)


def _perplexity(run: Run) -> Curve:
    """Perplexity of plain text, which has no interval."""
    entries = run.drift["checkpoints"]
    y = [entry["perplexity"] for entry in entries]
    return Curve(run.label, [float(entry["facts"]) for entry in entries], y, y, y)


def _draw(axes: Axes, curves: Sequence[Curve], title: str, x_label: str) -> None:
    for line, curve in enumerate(curves):
        color = f"C{line % 10}"
        axes.plot(curve.x, curve.y, "o-", color=color, ms=3, lw=1.5, label=curve.label)
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, lw=0)
    axes.set_xscale("symlog", linthresh=1)
    ends = [x for curve in curves for x in curve.x]
    subs = [1, 2, 5] if max(ends) <= 100 * max(1, min(ends)) else [1]  # labels that do not touch
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=subs))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel(x_label, fontsize=8, color=_MUTED)
    axes.set_title(title, fontsize=8, color=_INK, loc="left", parse_math=False)
    axes.tick_params(labelsize=7, colors=_MUTED)
    axes.grid(color="#e6e9ec", lw=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
