"""The picture of the demo's result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GOOD, BAD, INK, MUTED = "#d5ecd9", "#f6d3cf", "#22303c", "#6b7885"
QUESTIONS = (("after", "written"), ("rephrase", "generalised"), ("neighbour", "neighbour_kept"))
TITLES = {"after": "edited prompt", "rephrase": "in other words", "neighbour": "neighbour"}


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def draw(facts: list[Any], outcomes: list[Any], path: Path) -> None:
    """Draw a grid: facts down, methods and questions across, each cell the model's own answer.

    Args:
        facts: What was asked; see ``demo.Fact``.
        outcomes: What came back; see ``demo.Outcome``.
        path: PNG to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    left, cell, gap = 5.6, 1.62, 0.18
    width = left + len(methods) * (3 * cell + gap)
    height = len(facts) + 2.3
    figure, axes = plt.subplots(figsize=(width * 0.82, height * 0.56), dpi=150)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    axes.text(0, 0.3, "What an edit did", fontsize=15, weight="bold", color=INK, va="center")
    axes.text(0, 0.95, "before  →  wanted", fontsize=8.5, color=MUTED, va="center")
    for row, fact in enumerate(facts):
        top = row + 1.45
        axes.text(
            0, top + 0.3, _short(fact.prompt, 52) + " …", fontsize=8.5, color=INK, va="center"
        )
        axes.text(
            0,
            top + 0.68,
            f"{_short(fact.before[0], 24)}  →  {_short(fact.wanted, 24)}",
            fontsize=8.5,
            weight="bold",
            color=INK,
            va="center",
        )
    for column, method in enumerate(methods):
        start = left + column * (3 * cell + gap)
        own = [outcome for outcome in outcomes if outcome.method == method]
        centre = start + 1.5 * cell
        axes.text(
            centre, 0.3, method, fontsize=12, weight="bold", color=INK, ha="center", va="center"
        )
        for index, (answer, verdict) in enumerate(QUESTIONS):
            x = start + index * cell
            right = sum(getattr(outcome, verdict) for outcome in own)
            label = f"{TITLES[answer]}\n{right} of {len(own)}"
            axes.text(
                x + cell / 2, 0.98, label, fontsize=7.5, color=MUTED, ha="center", va="center"
            )
            for outcome in own:
                top = outcome.fact + 1.45
                good = getattr(outcome, verdict)
                box = plt.Rectangle(
                    (x + 0.03, top + 0.04), cell - 0.06, 0.92, color=GOOD if good else BAD, lw=0
                )
                axes.add_patch(box)
                text = ("✓ " if good else "✗ ") + _short(
                    getattr(outcome, answer) or "(nothing)", 15
                )
                axes.text(
                    x + cell / 2, top + 0.5, text, fontsize=7.5, color=INK, ha="center", va="center"
                )
    exact = sum(outcome.rolled_back for outcome in outcomes)
    axes.text(
        0,
        height - 0.35,
        f"Cells show the edited model's own free answers. ✓ wanted answer; neighbour: same as "
        f"before. Rolled back bit for bit: {exact} of {len(outcomes)}.",
        fontsize=8,
        color=MUTED,
        va="center",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.2, facecolor="white")
    plt.close(figure)
