"""Runs side by side: intervals, tests, tables, and which runs may stand beside each other."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests

from kedit_lightning.analysis.comparison import compared, read_run
from kedit_lightning.analysis.figures.retention_figure import draw_retention
from kedit_lightning.benchmark import Protocol
from kedit_lightning.cli.main import main
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.metrics.functional.bootstrap import paired_difference, resampled_means
from kedit_lightning.metrics.functional.paired_tests import bootstrap_p, holm, mcnemar
from kedit_lightning.runs.record_lines import line_of
from kedit_lightning.runs.results import summary_of


def record(id: int, held: bool, kl: float) -> ExampleRecord:
    reading = {"tf_all": held, "tf_tok": float(held)}
    kept = {"kl": kl}
    probe = {"group": "", "prompt": "p", "answers": ["a"], "contrast": None}
    probes: list[Any] = [
        {**probe, "kind": "rewrite", "group": "rewrite", "base": reading, "before": reading,
         "after": reading},
        {**probe, "kind": "locality", "group": "locality", "base": kept, "before": kept,
         "after": kept},
    ]  # fmt: skip
    return {"id": str(id), "stage": "immediate", "probes": probes, "subject": f"s{id // 2}"}


def folder(path: Path, method: str, held: list[bool], kl: float = 0.1, **facts: Any) -> Path:
    path.mkdir()
    protocol = facts.pop("protocol", Protocol(mode="single", generate=False))
    lines = [line_of(record(i, h, kl + i / 100)) for i, h in enumerate(held)]
    (path / "results.jsonl").write_bytes(b"".join(lines))
    results = {
        "method": {"name": method},
        "base_model": {"fingerprint": "f"},
        "dataset": {"sha256": "d", "records": len(held)},
        "protocol": {**protocol.facts(), "id": protocol.id},
        "metric_protocol": {"scoring": "default"},
        "seed": 0,
        **facts,
    }
    (path / "results.json").write_text(json.dumps(results))
    return path


@pytest.mark.parametrize("seed", range(8))
def test_mcnemar_equals_statsmodels(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randint(2, (2, 40), generator=generator).double()
    table = [[int(((a == x) & (b == y)).sum()) for y in (1, 0)] for x in (1, 0)]
    assert mcnemar(a, b) == pytest.approx(reference_mcnemar(table, exact=True).pvalue)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_without_a_difference() -> None:
    assert mcnemar([1, 0], [1, 0]) == 1.0
    with pytest.raises(ValueError, match="0 and 1"):
        mcnemar([0.5], [1.0])
    with pytest.raises(ValueError, match="same cases"):
        mcnemar([1.0], [1.0, 0.0])


@pytest.mark.parametrize("seed", range(4))
def test_holm_equals_statsmodels(seed: int) -> None:
    p = torch.rand(7, generator=torch.Generator().manual_seed(seed)).mul(0.1).tolist()
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist())
    assert holm([]) == []


def test_the_bootstrap_p_value_is_uniform_where_nothing_differs() -> None:
    """Over 200 samples of no difference, about one in ten has a value below one in ten."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 60, generator=generator, dtype=torch.float64)
    p = [bootstrap_p(resampled_means(row[:, None], resamples=400, seed=1)[:, 0]) for row in values]
    assert 0.05 < sum(value < 0.1 for value in p) / len(p) < 0.16


def test_runs_that_differ_are_told_apart(tmp_path: Path) -> None:
    runs = [
        read_run(folder(tmp_path / "a", "ROME", [True] * 20)),
        read_run(folder(tmp_path / "b", "FTM", [False] * 12 + [True] * 8)),
        read_run(folder(tmp_path / "c", "MEMIT", [True] * 19 + [False])),
    ]
    comparison = compared(runs)
    assert comparison.labels == ("ROME", "FTM", "MEMIT")
    assert comparison.scores["rewrite/tf_all"]["FTM"].mean == 0.4
    pairs = {(d.first, d.second): d for d in comparison.differences if d.score == "rewrite/tf_all"}
    assert pairs["ROME", "FTM"].told_apart
    assert not pairs["ROME", "MEMIT"].told_apart
    assert pairs["ROME", "FTM"].p == pytest.approx(2 * 0.5**12)
    assert pairs["ROME", "FTM"].adjusted == pytest.approx(3 * 2 * 0.5**12)
    a, b = torch.ones(20), torch.tensor([0.0] * 12 + [1.0] * 8)
    clusters = torch.arange(20) // 2
    # The order of the cases is not that of the file, and changes nothing but the draws.
    mean, low, high = paired_difference(a, b, clusters)
    found = pairs["ROME", "FTM"]
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)
    only = compared(runs, only=["rewrite/tf_all"])
    assert list(only.scores) == ["rewrite/tf_all"]
    assert {one.adjusted for one in only.differences} == {one.adjusted for one in pairs.values()}
    with pytest.raises(UnsupportedUseError, match="at least two runs, got 0; name their output"):
        compared([])
    with pytest.raises(UnsupportedUseError, match="not all runs have rewrite/tf_al; all"):
        compared(runs, only=["rewrite/tf_al"])
    same = [d for d in comparison.differences if d.score == "locality/kl"]
    assert all(math.isclose(d.mean, 0.0, abs_tol=1e-12) and not d.told_apart for d in same)


def test_one_of_many_runs_is_told_apart_from_all_others(tmp_path: Path) -> None:
    paths = [
        folder(tmp_path / str(i), f"method {i}", [True] * 20, kl=0.1 + 2 * (i == 3))
        for i in range(24)
    ]
    differences = compared([*map(read_run, paths)], only=["locality/kl"]).differences
    assert len(differences) == 276
    apart = {frozenset((d.first, d.second)) for d in differences if d.told_apart}
    assert apart == {frozenset((f"method {i}", "method 3")) for i in range(24) if i != 3}


def test_the_command_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [folder(tmp_path / name, "ROME", [True] * (8 + n) + [False] * (8 - n))
            for n, name in enumerate(["one", "two"])]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, runs), "--output", str(tmp_path / "out")])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert re.search(r"not told apart: one and two: .*rewrite/tf_all", text)
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    row = next(r for r in rows if r["score"] == "rewrite/tf_all" and r["run"] == "two")
    assert float(row["mean"]) == 9 / 16
    latex = (tmp_path / "out" / "comparison.tex").read_text()
    assert r"rewrite/tf\_all & 0.500 & 0.562 \\" in latex
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"protocol": Protocol(mode="single", generate=True)}, r"protocol\.id .*generate \(false"),
        ({"dataset": {"sha256": "e", "records": 4}}, r"dataset\.sha256 .*a: d; b: e"),
        ({"base_model": {"fingerprint": "g"}}, "base_model.fingerprint"),
        ({"metric_protocol": {"scoring": "legacy"}}, "metric_protocol.scoring"),
    ],
)
def test_runs_of_other_protocols_are_refused(
    tmp_path: Path, facts: dict[str, Any], words: str
) -> None:
    first = read_run(folder(tmp_path / "a", "ROME", [True] * 4))
    second = read_run(folder(tmp_path / "b", "FTM", [True] * 4, **facts))
    with pytest.raises(ValueError, match=words):
        compared([first, second])


def test_what_is_no_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path / "empty"), str(tmp_path / "empty")])
    assert ended.value.code == 2
    assert "kedit test --resume" in capsys.readouterr().err


def test_streams_are_drawn_with_what_they_keep(tmp_path: Path) -> None:
    """The end of a stream and what it lost stand in the table; checkpoints in the curves alone."""
    protocol = Protocol(mode="sequential", every="log", generate=False)
    paths = []
    for name, lost in (("ROME", 1), ("FTM", 3)):
        path = folder(tmp_path / name, name, [True] * 5, protocol=protocol)
        records: list[Any] = [{**record(i, i >= lost * (stage == "final"), 0.1), "stage": stage}
                              for stage, count in (("immediate", 5), ("after_2", 2), ("final", 5))
                              for i in range(count)]  # fmt: skip
        (path / "results.jsonl").write_bytes(b"".join(map(line_of, records)))
        results = json.loads((path / "results.json").read_text())
        results |= {"retention": summary_of(records, protocol, 0)["retention"]}
        (path / "results.json").write_text(json.dumps(results))
        drift = [{"facts": n, "perplexity": 9.0 + n} for n in (0, 2, 5)]
        (path / "drift.json").write_text(json.dumps({"checkpoints": drift}))
        paths.append(path)
    runs = [read_run(path) for path in paths]
    assert runs[1].drift["checkpoints"][-1]["perplexity"] == 14.0
    found = compared(runs)
    assert found.scores["final/rewrite/tf_all"]["FTM"].mean == 0.4
    assert found.scores["forget/rewrite/tf_all"]["ROME"].mean == pytest.approx(0.2)
    assert not any(key.startswith("after") for key in found.scores)
    with pytest.raises(SystemExit):
        main(["compare", *map(str, paths), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "retention.png").read_bytes().startswith(b"\x89PNG")
    assert draw_retention([replace(run, facts={}) for run in runs], tmp_path / "none.png") is None
