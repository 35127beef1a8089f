"""The differences that one choice makes, and the script that measures them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import disagreements
import numpy as np
import pytest
import torch
from disagreements import DisputedFacts, begins_with, invented_name, run_cell
from paired_choices import Cell, Choices, Pair, Side, Sizes, by_fact, measured, moved, order_spread

from kedit_lightning import methods


def drawn(facts, seed):
    """Cases of two probes a fact, which share its luck."""
    luck = np.random.default_rng(seed).random(facts) < 0.5
    keys = [(f"f{i}", "rephrase", "", n) for i in range(facts) for n in range(2)]
    return {key: float(luck[i // 2]) for i, key in enumerate(keys)}


def test_the_difference_is_paired_and_clustered_by_fact():
    first, second = drawn(60, 0), drawn(60, 1)
    second.pop(("f0", "rephrase", "", 1))
    second["other", "rephrase", "", 0] = 1.0
    shared = [case for case in first if case in second]
    gains = np.array([second[case] - first[case] for case in shared])
    facts = np.array([int(case[0][1:]) for case in shared])
    result = moved(first, second)
    assert result.cases == 119
    assert result.mean == pytest.approx(100 * gains.mean(), abs=1e-9)
    # The slow way: facts are drawn with replacement, each with all its cases.
    random = np.random.default_rng(2)
    sums, counts = np.bincount(facts, gains), np.bincount(facts)
    draws = [random.integers(60, size=60) for _ in range(20_000)]
    means = [sums[draw].sum() / counts[draw].sum() for draw in draws]
    low, high = 100 * np.quantile(means, [0.025, 0.975])
    assert result.low == pytest.approx(low, abs=1.0)
    assert result.high == pytest.approx(high, abs=1.0)


def test_no_case_in_common_moves_nothing_that_can_be_told():
    assert moved({("a", "rewrite", "", 0): 1.0}, {("b", "rewrite", "", 0): 1.0}) is None


def test_probes_of_two_kinds_are_paired_by_fact():
    values = {("a", "rephrase", "", 0): 1.0, ("a", "rephrase", "", 1): 0.0}
    assert by_fact(values | {("b", "rephrase", "", 0): 1.0}) == {
        ("a", "", "", 0): 0.5,
        ("b", "", "", 0): 1.0,
    }


def test_orders_may_agree_in_the_mean_and_not_on_facts():
    first = {("a", "", "", 0): 1.0, ("b", "", "", 0): 0.0, ("c", "", "", 0): 1.0}
    second = {("a", "", "", 0): 0.0, ("b", "", "", 0): 1.0, ("c", "", "", 0): 1.0}
    spread = order_spread([first, second, first])
    assert spread["sd"] == 0
    assert spread["flipped"] == pytest.approx(100 * (2 / 3 + 2 / 3) / 3)


def test_a_side_takes_its_stage_kind_and_score():
    def case(stage, kind, group, exact, forced):
        scores = {"exact": exact, "forced": forced, "known": None}
        place = {"fact": "a", "stage": stage, "kind": kind, "group": group, "number": 0}
        return place | {"scores": scores}

    cell = Cell("FTM", 1, mode="sequential")
    found = [
        case("immediate", "rewrite", "rewrite", 1.0, 1.0),
        case("final", "rewrite", "rewrite", 0.0, 1.0),
        case("final", "rephrase", "rephrase", 0.0, 0.0),
    ]

    def read(cell):
        return {"cases": found}

    panels = ("rewrite",)
    immediate = Pair("c", "FTM", Side((cell,)), Side((cell,), stage="immediate"), panels)
    assert measured(immediate, read)["rewrite"].mean == 100
    forced = Pair("c", "FTM", Side((cell,)), Side((cell,), "forced"), ("rewrite", "rephrase"))
    assert {k: v.mean for k, v in measured(forced, read).items()} == {"rewrite": 100, "rephrase": 0}
    words = Pair(
        "c", "FTM", Side((cell,), "forced", kind="rephrase"), Side((cell,), "forced"), panels
    )
    assert measured(words, read)["rewrite"].mean == 100


def test_each_pair_changes_one_setting():
    sizes = Sizes(usual=5, changed=3, layer=4, stream=2)
    found = Choices(
        ["FTM", "MEMIT"], {"FTM": "FTM:steps=100"}, sizes, {"FTM": {"0": "FTM:layers=[0]"}}
    )
    for pair in (pair for pairs in found.pairs.values() for pair in pairs):
        first, second = pair.first.cells[0], pair.second.cells[0]
        changed = {k for k, v in vars(first).items() if v != vars(second)[k]} - {"facts", "chunk"}
        if pair.scores_alone:
            assert changed == set()
            assert pair.first != pair.second
        else:
            assert len(changed) == 1, pair
    labels = {pair.choice for pairs in found.pairs.values() for pair in pairs}
    assert {"layer", "end-of-text token trained", "teacher-forced, not free"} <= labels


def test_names_are_the_same_for_the_same_fact():
    assert invented_name("7") == invented_name("7") != invented_name("8")
    assert not begins_with(" Rome", "Rome and")
    assert begins_with(" Rome and", "Rome")


@pytest.fixture(scope="module")
def base():
    return disagreements.load("nano")


def test_the_token_in_a_request_is_what_fine_tuning_calls_eos_in_target(base):
    ended = DisputedFacts("words", "</s>", None, 1).examples("test")[0]
    plain = DisputedFacts("words", "", None, 1).examples("test")[0]
    assert ended.probes == plain.probes
    by_text = methods.FTM(base, steps=2).edit(list(ended.requests))
    by_setting = methods.FTM(base, steps=2, eos_in_target=True).edit(list(plain.requests))
    without = methods.FTM(base, steps=2).edit(list(plain.requests))
    first, second, third = (list(e.state()[0].values()) for e in (by_text, by_setting, without))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def test_scores_of_a_run_have_each_probe_once(base):
    cases = run_cell(base, Cell("FTM:steps=2", 2, "names"), None)["cases"]
    places = [(c["fact"], c["stage"], c["kind"], c["group"], c["number"]) for c in cases]
    assert len(set(places)) == len(places)
    assert {c["kind"] for c in cases} >= {"rewrite", "rephrase", "locality"}
    rewrites = [c["scores"] for c in cases if c["kind"] == "rewrite"]
    assert all(s["known"] is None and s["exact"] in (0.0, 1.0) for s in rewrites)


@pytest.mark.slow
def test_the_script_continues_and_draws(tmp_path: Path, monkeypatch, capsys):
    arguments = ["--methods", "FTM", "--limit", "3", "--changed", "3", "--layer", "3"]
    arguments += ["--choices", "teacher", "end-of-text", "--output", str(tmp_path)]
    arguments += ["--draw", str(tmp_path / "moved.png")]
    monkeypatch.setattr(sys, "argv", ["disagreements.py", *arguments])
    disagreements.main()
    table = capsys.readouterr().out
    assert "| teacher-forced, not free | FTM, names |" in table
    rows = json.loads((tmp_path / "nano.json").read_text())["rows"]
    assert {row["choice"] for row in rows} == {
        "teacher-forced, not free",
        "end-of-text token trained",
    }
    assert (tmp_path / "moved.png").stat().st_size > 10_000
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "nano").iterdir()}
    assert len(made) == 4
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--finished"])
    disagreements.main()
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert capsys.readouterr().out == table
