"""``report.html``: one page, without a network, that shows texts as they are."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.metrics.retention import Spread
from kedit_lightning.runs import html_report as module
from kedit_lightning.runs.html_report import html_report

FACTS: dict[str, Any] = {
    "method": {"name": "ROME", "resolved": {"layer": 5}},
    "base_model": {"name": "nano", "dtype": "torch.float32", "fingerprint": "abc"},
    "dataset": {"name": "Requests", "records": 2, "sha256": "d"},
    "protocol": {"mode": "single", "id": "p"},
    "metric_protocol": {"free_answers": "greedy", "intervals": "95%"},
    "seed": 0,
    "versions": {"torch": "2"},
}
SCORES = {
    "rewrite/gen_em": {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 2},
    "locality/kl": {"mean": 1.5, "low": 0.5, "high": 2.5, "n": 2},
    "locality/near/kl": {"mean": 1.5, "low": 0.5, "high": 2.5, "n": 2},
}
HOSTILE = '<script>alert("x")</script> & "quotes"'


def record(id: str, base: str | None, after: str | None) -> ExampleRecord:
    probe: Any = {
        "kind": "rewrite", "group": "rewrite", "prompt": HOSTILE, "answers": ["a", "b"],
        "contrast": None, "base": {"text": base}, "before": {}, "after": {"text": after,
                                                                        "tf_all": True},
    }  # fmt: skip
    return {"id": id, "stage": "immediate", "probes": [probe]}


class Page(HTMLParser):
    """Tags with their attributes, and all text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._raw = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._raw else data


def test_a_page_shows_every_question_and_score() -> None:
    page = Page(html_report(FACTS, SCORES, [record("1", "Paris", "Rome"), record("2", "x", "x")]))
    assert page.text.count(HOSTILE) == 2
    assert "0.500" in page.text
    assert "0.250 – 0.750" in page.text
    assert "layer: 5" in page.text
    states = [a["data-state"] for tag, a in page.tags if tag == "tr" and "data-state" in a]
    assert states == ["changed", "same"]
    assert [tag for tag, _ in page.tags].count("script") == 1  # none of a text's own
    bars = [a["style"] for tag, a in page.tags if tag == "i"]
    assert bars == ["left:25.00%;width:50.00%"]  # a divergence has no axis from 0 to 1


def test_a_page_needs_no_network() -> None:
    text = html_report(FACTS, SCORES, [record("1", None, None)])
    assert not re.search(r"(src|href)\s*=|https?:|@import|url\(", text)


def test_a_long_run_says_what_the_page_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHOWN", 2)
    text = html_report(FACTS, SCORES, [record(str(n), "a", "b") for n in range(5)])
    assert "results.csv has the other 3" in text
    assert text.count("data-kind=") == 2


def test_a_stream_has_its_matrices_and_its_orders() -> None:
    retention = {
        "checkpoints": [1, 2, 5],
        "scores": {"rewrite/tf_all": {"matrix": [[1.0, None, None], [1.0, 0.5, None],
                                                 [0.125, 0.0, 0.75]]}},
        "collapse": {"at": 5},
    }  # fmt: skip
    orders = {"final/rewrite/tf_all": Spread(0.5, 0.25, 0.375, 0.625, [0.375, 0.625])}
    page = Page(html_report(FACTS, SCORES, [record("1", "a", "b")], retention, orders))
    for text in ("3–5", "5 facts", "0.12", "0.75", "0.250", "0.625"):
        assert text in page.text
    assert "collapsed after 5 facts" in page.text
    plain = Page(html_report(FACTS, SCORES, []))
    assert not re.search("stream keeps|orders of the", plain.text)


def test_the_end_of_a_stream_stands_before_what_was_scored_on_the_way() -> None:
    later = {
        f"{stage}{key}": entry for stage in ("final/", "forget/") for key, entry in SCORES.items()
    }
    page = Page(html_report(FACTS, {**SCORES, **later}, [record("0", "a", "b")]))
    titles = ["After the last edit", "Right after each edit", "Lost in between"]
    assert [page.text.index(title) for title in titles] == sorted(map(page.text.index, titles))
    assert "Right after each edit" not in Page(html_report(FACTS, SCORES, [])).text
