"""The picture of a fit: losses, edit success and locality, learning rates of the edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Without pyplot there is no window and no global state, and a notebook keeps its own backend.
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kedit_lightning.analysis.learning_curve import Curve

_INK, _MUTED = "#22303c", "#6b7885"
#: Curves of a panel that a legend can still tell apart.
_NAMED = 12


@dataclass(frozen=True)
class Panel:
    """One pair of axes, with its title."""

    title: str
    unit: str  # label of the vertical axis
    holds: Callable[[str], bool]  # whether a scalar of this name belongs here
    cut: str = ""  # prefix of names that the legend leaves out
    scale: str = "linear"  # of the vertical axis


def _judgement(name: str) -> bool:
    return name.startswith("validation ") or name == "edit_success"


#: Panels in order; a scalar that belongs to none gets one of its own.
PANELS = (
    Panel("Losses", "loss (nats a token)", lambda name: name.startswith("loss"), scale="log"),
    Panel("Edit success and locality", "share of questions (0 to 1)", _judgement),
    Panel(
        "Learning rates of the edits",
        "learning rate (weight per gradient)",
        lambda name: name.startswith("edit_lr/"),
        cut="edit_lr/",
    ),
)


def panels_of(names: Sequence[str]) -> list[tuple[Panel, list[str]]]:
    """Sort scalars into panels; panels without any are left out."""
    panels = [(panel, [name for name in names if panel.holds(name)]) for panel in PANELS]
    for name in names:
        if not any(panel.holds(name) for panel in PANELS):
            words = name.replace("_", " ").replace("/", ", ")
            panels.append((Panel(words.capitalize(), words, lambda _: True), [name]))
    return [(panel, scalars) for panel, scalars in panels if scalars]


def draw_training(curves: Mapping[str, Curve], path: str | Path, title: str) -> Path:
    """Draw the scalars of a fit over its steps, scalars of a kind on common axes.

    The same curves give the same picture, whatever the user's own matplotlib settings say. Curves
    named ``validation …`` have a mark at each point. Returns the path of the PNG.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A count that stayed at zero, such as that of skipped episodes, says nothing in a picture.
    drawn = [name for name, curve in curves.items() if any(curve.values)]
    panels = panels_of(drawn)
    columns = min(2, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    with style.context("default"):
        figure = Figure(figsize=(6.0 * columns, 3.4 * rows), dpi=150, layout="constrained")
        figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left", parse_math=False)
        for place, (panel, names) in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, place)
            _fill(axes, panel, {name: curves[name] for name in names})
        # The version of matplotlib is no part of the picture.
        figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})
    return path


def _fill(axes: Axes, panel: Panel, curves: Mapping[str, Curve]) -> None:
    # Many curves, such as one a matrix, come in the order of the layers: let their colours too.
    many = len(curves) > 6
    for number, (name, curve) in enumerate(curves.items()):
        colour = colormaps["viridis"](0.92 * number / len(curves)) if many else f"C{number}"
        few = name.startswith("validation ") or len(curve.steps) < 2
        label = name.removeprefix(panel.cut).replace("_", " " if not panel.cut else "_")
        marker = "o" if few else None
        axes.plot(curve.steps, curve.values, color=colour, lw=1.3, marker=marker, ms=4, label=label)
    positive = all(value > 0 for curve in curves.values() for value in curve.values)
    axes.set_yscale(panel.scale if positive else "linear")
    if panel.unit.endswith("(0 to 1)"):
        axes.set_ylim(-0.03, 1.03)
    axes.set_title(panel.title, fontsize=9, color=_INK, loc="left")
    axes.set_xlabel("step of the optimizer", fontsize=8, color=_INK)
    axes.set_ylabel(panel.unit, fontsize=8, color=_INK)
    axes.tick_params(labelsize=7, colors=_MUTED)
    axes.grid(color="#e6e9ec", lw=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel in PANELS:
        shown = axes.get_legend_handles_labels()
        step = -(-len(curves) // _NAMED)
        legend = axes.legend(shown[0][::step], shown[1][::step], fontsize=6, frameon=False)
        if many:
            legend.set_loc("upper left")
            legend.set_bbox_to_anchor((1, 1), axes.transAxes)
