"""A comparison of runs as text, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections import defaultdict

from rich.table import Table

from kedit_lightning.analysis.comparison import Comparison, Difference
from kedit_lightning.metrics import SummaryRow
from kedit_lightning.metrics.retention import Spread

#: Pairs that a sentence names.
_NAMED = 12


def cell(row: SummaryRow, spread: Spread | None = None) -> str:
    """Mean and interval of a score, and its spread over the orders of a stream.

    >>> cell(SummaryRow("rewrite/gen_em", 0.5, 0.25, 0.75, 4))
    '0.500 (0.250 – 0.750)'
    """
    text = f"{row.mean:.3f} ({row.low:.3f} – {row.high:.3f})"
    if spread is None:
        return text
    bounds = f"{spread.low:.3f} – {spread.high:.3f}, sd {spread.sd:.3f}"
    return f"{text}; {len(spread.values)} orders {bounds}"


def text_table(comparison: Comparison) -> Table:
    """Scores by run, with intervals, for the terminal."""
    caption = "mean (95% interval)"
    if any(comparison.spread.values()):
        caption += "; least and most over the orders of a stream, and their standard deviation"
    table = Table("score", "cases", *comparison.labels, caption=caption)
    for key, rows in comparison.scores.items():
        cases = sorted({row.n for row in rows.values()})
        spread = comparison.spread.get(key, {})
        shown = [cell(rows[label], spread.get(label)) for label in comparison.labels]
        table.add_row(key, " / ".join(map(str, cases)), *shown)
    return table


def told_apart(comparison: Comparison) -> str:
    """Which pairs cannot be told apart, a line for all scores that say the same of them."""
    by_score: dict[str, list[Difference]] = defaultdict(list)
    for one in comparison.differences:
        by_score[one.score].append(one)
    verdicts: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for score, found in by_score.items():
        alike = tuple(f"{one.first} and {one.second}" for one in found if not one.told_apart)
        verdicts[alike].append(score)
    lines = []
    for alike, scores in sorted(verdicts.items(), key=lambda item: len(item[0])):
        more = f" and {len(alike) - _NAMED} more pairs" if len(alike) > _NAMED else ""
        verdict = (
            f"not told apart: {', '.join(alike[:_NAMED])}{more}" if alike else "all pairs differ"
        )
        lines.append(f"{verdict}: {', '.join(scores)}")
    return "\n".join(lines)


def csv_table(comparison: Comparison) -> str:
    """Scores, and behind them the differences of pairs with their p-values, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["score", "run", "minus", "mean", "low", "high", "cases", "p", "p_holm"]
    writer.writerow([*names, "orders", "order_mean", "order_sd", "order_min", "order_max"])
    for key, rows in comparison.scores.items():
        for label, row in rows.items():
            spread = comparison.spread.get(key, {}).get(label)
            orders = [] if spread is None else [len(spread.values), *spread[:4]]
            writer.writerow([key, label, "", row.mean, row.low, row.high, row.n, "", "", *orders])
    for one in comparison.differences:
        numbers = (one.mean, one.low, one.high, one.cases, one.p, one.adjusted)
        writer.writerow([one.score, one.first, one.second, *numbers])
    return text.getvalue()


def latex_table(comparison: Comparison) -> str:
    """Scores as a LaTeX table for the package booktabs; intervals stand below the means."""
    columns = "l" + "c" * len(comparison.labels)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(["score", *map(_escaped, comparison.labels)]) + r" \\", r"\midrule"]
    for key, rows in comparison.scores.items():
        shown = [rows[label] for label in comparison.labels]
        means = " & ".join(f"{row.mean:.3f}" for row in shown)
        bounds = " & ".join(rf"{{\small [{row.low:.3f}, {row.high:.3f}]}}" for row in shown)
        lines += [rf"{_escaped(key)} & {means} \\", rf" & {bounds} \\"]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    for sign in "_%&#$":
        text = text.replace(sign, rf"\{sign}")
    return text
