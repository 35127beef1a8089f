"""The page of the benchmark: tables with intervals, sorted by nobody's favourite score."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_scores import SCORES
from jinja2 import Environment, FileSystemLoader

TITLES = {
    "single": "each fact under an edit of its own",
    "batch": "many facts in one edit",
    "sequence": "edits of ten facts that stay in force, in three orders",
}
_WORDS = {"neighborhood": "neighbours", "other_relation": "same subject"}


class Value(NamedTuple):
    """A number of the table with what a reader is told of it.

    ``left`` and ``width`` place its interval, in percent of the cell; ``sort`` orders rows.
    """

    text: str
    note: str = ""
    sort: float | str = ""
    left: float | None = None
    width: float = 0.0
    alike: tuple[str, ...] = ()


def write_page(content: Mapping[str, Any], folder: Path) -> None:
    """Write `index.html` and the numbers behind it, `results.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "index.html").write_text(page(content), encoding="utf-8")


def page(content: Mapping[str, Any]) -> str:
    """The page; it has its style and its few lines of script inside."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("leaderboard.html.j2").render(
        content=content, tables=page_tables(content), titles=TITLES
    )


def page_tables(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables, with rows in the order of the alphabet."""
    cells = {cell["name"]: cell for cell in content["cells"]}
    return [_table(table, cells) for table in content["tables"]]


def _table(table: Mapping[str, Any], cells: Mapping[str, Any]) -> dict[str, Any]:
    own = sorted((cells[name] for name in table["cells"]), key=lambda c: c["method"].lower())
    scored = [cell for cell in own if not cell["error"]]
    keys = _columns(scored)
    columns = [*(_title(key) for key in keys)]
    rows = [
        {
            "cell": cell,
            "values": [*(_value(cell, key, table["alike"].get(key, ())) for key in keys),
                       *_costs(cell)],
            "alike": _sentences(cell["method"], keys, table["alike"]),
        }
        for cell in scored
    ]  # fmt: skip
    first = scored[0] if scored else {}
    return {
        **{name: table[name] for name in ("model", "data", "protocol")},
        "id": f"{table['model']}.{table['data']}.{table['protocol']}",
        "facts": first.get("facts"),
        "protocol_id": first.get("protocol_id"),
        "columns": [*columns, "perplexity", "choices", "s / fact", "peak MB"],
        "rows": rows,
        "apart": table.get("apart", ()),
        "failed": [cell for cell in own if cell["error"]],
        "pairs": math.comb(len(scored) - len(table.get("apart", ())), 2),
        "undecided": [(_title(key), len(table["alike"].get(key, ()))) for key in keys],
    }


def _columns(cells: list[Mapping[str, Any]]) -> list[str]:
    """Scores that some cell has: the named ones, what is forgotten, and locality by stratum."""
    has = {key: None for cell in cells for key in cell["scores"]}
    strata = [key for key in has if key.count("/") == 2 and key.endswith(("/known", "/keep_top1"))]
    # A stratum of which nothing was known before the edits tells by what is unchanged.
    shown = [key for key in strata if key.endswith("/known")]
    groups = {key.split("/")[1] for key in shown}
    shown += [key for key in strata if key.split("/")[1] not in groups]
    named = [key for key in SCORES if key in has]
    forgotten = [key for key in has if key.startswith("forget/")]
    return [*named[:3], *forgotten, *named[3:], *(shown if len(shown) > 1 else [])]


def _title(key: str) -> str:
    if key.startswith("forget/"):
        return "rewrite: forgotten"
    if key in SCORES:
        return SCORES[key]
    _, group, name = key.split("/")
    kept = "known" if name == "known" else "top 1"
    return f"{_WORDS.get(group, group.replace('_', ' '))}: {kept}"


def _value(cell: Mapping[str, Any], key: str, alike: Any) -> Value:
    score = cell["scores"].get(key)
    if score is None or score["mean"] is None:
        return Value("–")
    mean, low, high = score["mean"], score["low"], score["high"]
    digits = 3 if key.endswith("/kl") else 2
    text = f"{mean:.{digits}f}"
    note = f"{low:.{digits}f} – {high:.{digits}f}, n {score['n']}"
    if "orders" in score:
        note += f"; orders {score['order_low']:.2f} – {score['order_high']:.2f}"
    near = tuple(a if b == cell["method"] else b for a, b in alike if cell["method"] in (a, b))
    share = not key.endswith("/kl") and not key.startswith("forget/")
    left = 100 * low if share else None
    return Value(text, note, mean, left, max(100 * (high - low), 1.5), near)


def _costs(cell: Mapping[str, Any]) -> Iterator[Value]:
    ability = cell.get("ability")
    if ability is None:
        yield Value("–")
        yield Value("–")
    else:
        text, asked = ability["perplexity"], ability["choices"]
        worst = "overflow" if text["worst"] is None else f"{text['worst']:,.1f}"
        yield Value(
            f"{text['after']:,.1f}", f"before {text['before']:,.1f}, worst {worst}", text["after"]
        )
        claim = (
            "not inferior" if asked["not_inferior"] else f"cannot claim, needs {asked['needed']}"
        )
        note = f"before {asked['before']:.2f}, {asked['documents']} questions: {claim}"
        yield Value(f"{asked['after']:.2f}", note, asked["after"])
    yield Value(f"{cell['edit_seconds']:.2g}", "", cell["edit_seconds"])
    yield Value(f"{cell['peak_bytes'] / 1e6:,.0f}", "", cell["peak_bytes"])


def _sentences(method: str, keys: list[str], alike: Mapping[str, Any]) -> list[str]:
    """For each score the methods that this one cannot be told apart from."""
    found = []
    for key in keys:
        near = sorted(a if b == method else b for a, b in alike.get(key, ()) if method in (a, b))
        if near:
            found.append(f"{_title(key)}: {', '.join(near)}")
    return found
