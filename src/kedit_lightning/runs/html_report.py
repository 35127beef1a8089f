"""``report.html``: the results of a run as one page that needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader

from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.metrics.retention import PARTS, Spread
from kedit_lightning.registry import entries
from kedit_lightning.runs.results import is_headline, place_of_score

#: Examples that a page shows; a browser gets slow with more. ``results.csv`` has all of them.
SHOWN = 1000
#: Stages of a run, the end of a stream first.
_STAGES = {"final": "After the last edit", "": "Right after each edit", "forget": "Lost in between"}


class Score(NamedTuple):
    """A score of the table; ``left`` and ``width`` place its interval, in percent of the axis."""

    key: str
    mean: float
    low: float
    high: float
    n: int
    is_share: bool

    @property
    def stage(self) -> str:
        """When it was scored; empty for scores right after an edit."""
        return place_of_score(self.key)[0]

    def number(self, value: float) -> str:
        """A value of it as text."""
        return f"{value:.3f}" if abs(self.high) < 1000 else f"{value:,.0f}"

    @property
    def left(self) -> float:
        """Where the interval begins."""
        return 100 * self.low

    @property
    def width(self) -> float:
        """How wide the interval is; at least as wide as can be seen."""
        return max(100 * (self.high - self.low), 0.6)


def html_report(
    facts: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, Any]],
    records: Iterable[ExampleRecord],
    retention: Mapping[str, Any] | None = None,
    orders: Mapping[str, Spread] | None = None,
) -> str:
    """A page with the facts of a run, its scores with intervals, and every question and answer.

    All texts are escaped; the page has its style and its few lines of script inside.

    Args:
        facts: What ``results.json`` says of the run.
        scores: Its scores, ``mean``, ``low``, ``high`` and ``n`` by key.
        records: The scored examples.
        retention: What a stream keeps, if it was asked at checkpoints.
        orders: How scores spread over the orders of a stream, if it had several.
    """
    environment = Environment(
        loader=PackageLoader("kedit_lightning.runs", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    metrics = [entry.load() for entry in entries("metric").values()]
    shares = {metric.name for metric in metrics if metric.value_range == "0 to 1"}
    rows = [
        Score(
            key,
            entry["mean"],
            entry["low"],
            entry["high"],
            entry["n"],
            key.rpartition("/")[2] in shares,
        )
        for key, entry in sorted(scores.items(), key=lambda item: place_of_score(item[0]))
    ]
    every = list(records)
    return environment.get_template("report.html.j2").render(
        facts=_plain_facts(facts),
        title=f"{facts['method']['name']} on {facts['base_model']['name']}",
        stages=[
            (title, found)
            for stage, title in _STAGES.items()
            if (found := [r for r in rows if is_headline(r.key) and r.stage == stage])
        ],
        groups=[row for row in rows if not is_headline(row.key)],
        stream=_stream(retention) if retention else None,
        orders={key: spread for key, spread in (orders or {}).items() if is_headline(key)},
        examples=[_example(record) for record in every[:SHOWN]],
        left_out=max(0, len(every) - SHOWN),
    )


def _stream(retention: Mapping[str, Any]) -> dict[str, Any]:
    """Matrices of what was written, in other words too, and of what was to stay."""
    checkpoints, scores = retention["checkpoints"], retention["scores"]
    firsts = [1, *(last + 1 for last in checkpoints)]
    ends = zip(firsts, checkpoints, strict=False)
    keys = (next((key for key in names if key in scores), None) for names in PARTS)
    return {
        "cohorts": [str(last) if first == last else f"{first}–{last}" for first, last in ends],
        "matrices": {
            key: list(zip(checkpoints, scores[key]["matrix"], strict=True))
            for key in keys
            if key is not None
        },
        "collapse": retention["collapse"]["at"],
    }


def _plain_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """What a reader asks first, by name."""
    protocol, data, model = facts["protocol"], facts["dataset"], facts["base_model"]
    settings = facts["method"].get("resolved") or facts["method"].get("settings") or {}
    named = {
        "method": facts["method"]["name"],
        "settings": ", ".join(f"{name}: {value}" for name, value in settings.items()),
        "base model": f"{model['name']} ({model.get('dtype', '')}), {model['fingerprint']}",
        "dataset": f"{data['name']}, {data.get('records')} records, SHA-256 {data.get('sha256')}",
        "protocol": f"{protocol['mode']}, id {protocol.get('id')}",
        "free answers": facts["metric_protocol"].get("free_answers", ""),
        "intervals": facts["metric_protocol"].get("intervals", ""),
        "seed": facts["seed"],
        "machine": ", ".join(
            f"{n} {v}" for n, v in facts.get("environment", {}).items() if v is not None
        ),
        "versions": ", ".join(f"{n} {v}" for n, v in facts.get("versions", {}).items()),
    }
    return {name: str(value) for name, value in named.items() if value not in ("", None)}


def _example(record: ExampleRecord) -> dict[str, Any]:
    probes = [
        {
            "kind": probe["kind"],
            "group": "" if probe["group"] == probe["kind"] else probe["group"],
            "prompt": probe["prompt"],
            "answers": " | ".join(probe["answers"]),
            "base": probe["base"].get("text"),
            "after": probe["after"].get("text"),
            "held": probe["after"].get("tf_all"),
        }
        for probe in record["probes"]
    ]
    return {"id": record["id"], "stage": record["stage"], "probes": probes}
