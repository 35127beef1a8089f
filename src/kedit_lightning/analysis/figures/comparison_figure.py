"""The picture of a comparison: the scores of each run with their intervals."""

from __future__ import annotations

from pathlib import Path

# Without pyplot there is no window and no global state, and a notebook keeps its own backend.
from matplotlib import style
from matplotlib.figure import Figure

from kedit_lightning.analysis.comparison import Comparison

_INK, _MUTED = "#22303c", "#6b7885"


def draw_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Draw means and 95% intervals, a panel for each score and a line for each run.

    Scores that are no shares, such as divergences, have axes of their own scale. Returns the path
    of the PNG.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = min(4, len(comparison.scores)) or 1
    rows = -(-len(comparison.scores) // columns) or 1
    height = 0.7 + 0.28 * len(comparison.labels)
    with style.context("default"):
        figure = Figure(figsize=(3.2 * columns, height * rows), dpi=150, layout="constrained")
        for place, (key, scores) in enumerate(comparison.scores.items(), 1):
            axes = figure.add_subplot(rows, columns, place)
            for line, label in enumerate(comparison.labels):
                row = scores[label]
                axes.plot([row.low, row.high], [line, line], color=f"C{line % 10}", lw=2)
                axes.plot(row.mean, line, "o", color=f"C{line % 10}", ms=5)
            axes.set_yticks(range(len(comparison.labels)), comparison.labels, fontsize=7)
            axes.set_ylim(len(comparison.labels) - 0.5, -0.5)
            if all(0 <= row.low <= row.high <= 1 for row in scores.values()):
                axes.set_xlim(-0.03, 1.03)
            axes.set_title(key, fontsize=8, color=_INK, loc="left", parse_math=False)
            axes.tick_params(labelsize=7, colors=_MUTED)
            axes.grid(color="#e6e9ec", lw=0.6)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})
    return path
