"""The heat map of a causal trace."""

from __future__ import annotations

import warnings
from pathlib import Path

# Without pyplot there is no window and no global state, and a notebook keeps its own backend.
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kedit_lightning.analysis.causal_trace import Trace

_INK, _MUTED, _SUBJECT = "#22303c", "#6b7885", "#b3541e"
#: Colours of the paper's figures: purple for whole blocks, green for MLPs.
_COLOURS = {"block": "Purples", "mlp": "Greens", "attention": "Reds"}
_STATES = {"block": "the block's", "mlp": "the MLP's", "attention": "attention's"}
#: Characters of a token and of a prompt that are shown.
_TOKEN, _PROMPT = 16, 70


def draw_trace(trace: Trace, path: str | Path) -> Path:
    """Draw the probability of the answer with each state restored: layers across, tokens down.

    The subject's tokens are marked. The scale begins at the corrupted probability. The same trace
    gives the same picture, whatever the user's own matplotlib settings say. Returns the path of
    the PNG.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    depth, tokens = trace.restored.shape
    with style.context("default"), warnings.catch_warnings():
        # A script the font lacks is drawn as boxes; the texts are in the trace.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        size = (3.2 + min(7.0, max(2.4, 0.34 * depth)), 1.5 + 0.26 * tokens)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.add_subplot()
        # As in the paper, what loses even more than the noise alone is as white as no effect.
        ceiling = max(trace.high, float(trace.restored.max()), trace.low + 1e-9)
        colours = axes.imshow(
            trace.restored.T.numpy(),
            cmap=_COLOURS[trace.kind],
            vmin=trace.low,
            vmax=ceiling,
            aspect="auto",
            interpolation="nearest",
        )
        _label(axes, trace)
        bar = figure.colorbar(colours, ax=axes, fraction=0.06, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7, colors=_MUTED)
        label = f"p({_short(trace.answer, _TOKEN)})"
        bar.set_label(label, fontsize=8, color=_INK, parse_math=False)
        # The version of matplotlib is no part of the picture.
        figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})
    return path


def _label(axes: Axes, trace: Trace) -> None:
    depth, tokens = trace.restored.shape
    first, last = trace.subject
    axes.set_yticks(range(tokens))
    for index, label in enumerate(axes.set_yticklabels(map(_shown, trace.tokens), fontsize=8)):
        inside = first <= index <= last
        label.set(color=_SUBJECT if inside else _INK, weight="bold" if inside else "normal")
        label.set_parse_math(False)
    # A line along the subject's rows, so that it is marked without colour too.
    axes.plot([-0.5, -0.5], [first - 0.5, last + 0.5], color=_SUBJECT, lw=4, clip_on=False)
    axes.set_xlim(-0.5, depth - 0.5)
    step = max(1, round(depth / 12))
    axes.set_xticks(range(0, depth, step))
    axes.tick_params(axis="both", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=_MUTED)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks([x - 0.5 for x in range(1, depth)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, tokens)], minor=True)
    axes.grid(which="minor", color="white", lw=0.8)
    axes.tick_params(which="minor", length=0)
    centre = "layer" if trace.window == 1 else f"centre of {trace.window} layers"
    across = f"{centre} at which {_STATES[trace.kind]} output is restored"
    axes.set_xlabel(across, fontsize=8, color=_INK)
    numbers = f"clean {trace.high:.3f}, subject under noise {trace.low:.3f}"
    title = f"{_short(trace.prompt, _PROMPT)} …\n{numbers}"
    axes.set_title(title, fontsize=9, color=_INK, loc="left", parse_math=False)


def _shown(token: str) -> str:
    """A token as a label; blank ones would leave their row without a name."""
    return _short(token.strip() or repr(token), _TOKEN)


def _short(text: str, width: int) -> str:
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return text if len(text) <= width else text[: width - 1] + "…"
