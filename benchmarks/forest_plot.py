"""The picture of what choices move: a row for each choice and method, points with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Without pyplot there is no window and no global state.
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paired_choices import PANELS

_INK, _MUTED, _GRID = "#22303c", "#6b7885", "#e6e9ec"
#: Height of a row and of the gap between two choices, in inches and in rows.
_ROW, _GAP = 0.17, 1.3


def draw_moved(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw what each choice moves, a panel for each kind of question; returns the path.

    Rows of several models stand on one line where choice and label are the same.
    """
    choices = list(dict.fromkeys(row["choice"] for row in rows))
    keys = list(dict.fromkeys((row["choice"], row["of"]) for row in rows))
    methods = list(dict.fromkeys(_method(of) for _, of in keys))
    keys.sort(key=lambda key: methods.index(_method(key[1])))
    places: dict[tuple[str, str], float] = {}
    titles, at = [], 0.0
    for choice in choices:
        at += _GAP
        titles.append((at - 0.1, choice))
        at += 1.0
        for key in (key for key in keys if key[0] == choice):
            places[key] = at
            at += 1.0
    style_of = {model: f"C{n}" for n, model in enumerate(dict.fromkeys(r["model"] for r in rows))}
    with style.context("default"):
        figure = Figure(figsize=(10.5, 1.0 + _ROW * at), dpi=130, layout="constrained")
        shown = [panel for panel in PANELS if any(panel in row for row in rows)]
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, panel in zip(panels, shown, strict=True):
            _draw(axes, rows, places, panel, style_of)
            for place, title in titles:
                axes.axhspan(place - 0.5, place + 0.6, color="#f3f5f7", lw=0, zorder=0)
                if axes is panels[0]:
                    axes.text(-98, place + 0.05, title, fontsize=7.5, weight="bold", va="center")
        panels[0].set_yticks(list(places.values()), [of for _, of in places], fontsize=7)
        panels[0].set_ylim(at, 0)
        if len(style_of) > 1:
            marks = panels[-1].get_legend_handles_labels()
            figure.legend(*marks, fontsize=8, loc="outside upper right", ncols=4, frameon=False)
        figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})
    return path


def _method(of: str) -> str:
    return of.split(",")[0]


def _draw(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    places: Mapping[tuple[str, str], float],
    panel: str,
    colours: Mapping[str, str],
) -> None:
    named: set[str] = set()
    models = list(colours)
    for row in rows:
        one = row.get(panel)
        if one is None:
            continue
        colour, model = colours[row["model"]], row["model"]
        place = places[row["choice"], row["of"]]
        place += 0.34 * (models.index(model) - (len(models) - 1) / 2)
        clear = one["low"] > 0 or one["high"] < 0
        axes.plot([one["low"], one["high"]], [place, place], color=colour, lw=1.6)
        axes.plot(
            one["mean"],
            place,
            "o",
            ms=4.2,
            color=colour,
            mfc=colour if clear else "white",
            label=None if model in named else model,
        )
        named.add(model)
    axes.axvline(0, color=_MUTED, lw=0.8, zorder=1)
    axes.set_xlim(-102, 102)
    axes.set_xlabel("points moved, 95 % interval (hollow: holds 0)", fontsize=8, color=_INK)
    axes.set_title(panel, fontsize=9, color=_INK, loc="left")
    axes.tick_params(labelsize=7, colors=_INK, length=0)
    axes.grid(axis="x", color=_GRID, lw=0.6)
    axes.xaxis.tick_bottom()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
