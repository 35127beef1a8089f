"""``kedit compare``: finished runs side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kedit_lightning.analysis.comparison import compared, named, read_run
from kedit_lightning.analysis.comparison_tables import (
    csv_table,
    latex_table,
    text_table,
    told_apart,
)
from kedit_lightning.analysis.figures.comparison_figure import draw_comparison
from kedit_lightning.analysis.figures.retention_figure import draw_retention
from kedit_lightning.cli.messages import UsageParser

USAGE = "kedit compare RUN RUN [RUN ...] [--output DIR] [--groups]"


def run_comparison(arguments: Sequence[str]) -> str:
    """Text of ``kedit compare``; with ``--output`` also table, figure and LaTeX in a folder.

    Raises:
        UsageError: The arguments do not fit.
        DataFileNotFoundError: A folder holds no finished run.
        UnsupportedUseError: The runs' numbers mean different things.
    """
    parser = UsageParser(USAGE)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--output")
    parser.add_argument("--groups", action="store_true")
    given = parser.parse_args(list(arguments))
    runs = [read_run(Path(run).expanduser()) for run in given.runs]
    comparison = compared(runs, given.groups)
    sink = io.StringIO()
    width = 40 + (64 if any(comparison.spread.values()) else 26) * len(comparison.labels)
    console = Console(file=sink, width=width, highlight=False, markup=False, soft_wrap=True)
    console.print(text_table(comparison))
    console.print(told_apart(comparison))
    if given.output is not None:
        folder = Path(given.output).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.csv").write_text(csv_table(comparison), encoding="utf-8")
        (folder / "comparison.tex").write_text(latex_table(comparison), encoding="utf-8")
        draw_comparison(comparison, folder / "comparison.png")
        console.print(f"comparison.csv, comparison.tex and comparison.png are in {folder}")
        if draw_retention(named(runs), folder / "retention.png") is not None:
            console.print(f"retention.png shows what the streams keep, also in {folder}")
    return sink.getvalue()
