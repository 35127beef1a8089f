"""Figures of the benchmark as Markdown, for `benchmarks/RESULTS.md`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmark_page import page_tables

SHOWN = ("rewrite/gen_em", "rephrase/gen_em", "locality/known")


def summary(content: Mapping[str, Any]) -> str:
    """Sizes, processor time, a table a protocol, and how many pairs cannot be told apart."""
    cells, missing = len(content["cells"]), len(content["missing"])
    lines = [
        f"{content['choice']['trials']} trials a method on {content['choice']['facts']} validation "
        f"facts: {content['choice_seconds'] / 60:.1f} minutes of one processor; {cells} cells: "
        f"{content['processor_seconds'] / 60:.1f} minutes. "
        f"{missing} of {cells + missing} cells were not run.",
    ]
    for table in page_tables(content):
        lines += ["", *_lines(table)]
    return "\n".join(lines)


def _lines(table: Mapping[str, Any]) -> Iterator[str]:
    undecided = ", ".join(f"{name} {count}" for name, count in table["undecided"])
    yield (
        f"{table['model']}, {table['data']}, {table['protocol']}, {table['facts']} facts, of "
        f"{table['pairs']} pairs cannot be told apart: {undecided}"
    )
    yield ""
    yield "| method | rewrite | rephrase | known | perplexity | choices | s a fact |"
    yield "|---|---|---|---|---|---|---|"
    for row in table["rows"]:
        cell = row["cell"]
        ability = cell["ability"]
        shown = [_score(cell["scores"].get(key)) for key in SHOWN]
        shown += (
            [f"{ability['perplexity']['after']:,.0f}", f"{ability['choices']['after']:.2f}"]
            if ability
            else ["–", "–"]
        )
        yield f"| `{cell['method']}` | {' | '.join(shown)} | {cell['edit_seconds']:.2g} |"


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None or score["mean"] is None:
        return "–"
    text = f"{score['mean']:.2f} ({score['low']:.2f}–{score['high']:.2f})"
    if "orders" in score:
        text += f", orders {score['order_low']:.2f}–{score['order_high']:.2f}"
    return text
