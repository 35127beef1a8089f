"""Scores of a run from its records, and the same under EasyEdit's names."""

import json
import random
from collections import defaultdict

import numpy as np
import pytest
import torch
from metric_records import example, probe, random_records

from kedit_lightning.errors import InvalidRequestError, KEditError
from kedit_lightning.metrics import (
    ANSWER_SCORES,
    GENERATION_SCORES,
    LOCALITY_SCORES,
    PASSAGE_SCORES,
    EditMetrics,
    LegacyEasyEdit,
)
from kedit_lightning.metrics.functional import (
    bootstrap_interval,
    share_interval,
    square_and_add_interval,
)

SCORES = (*ANSWER_SCORES, *GENERATION_SCORES, *LOCALITY_SCORES, *PASSAGE_SCORES)


def reference(records):
    """Case values by key, from the definition: probes to groups to kinds, each a plain mean."""
    cases = defaultdict(list)
    for record in records:
        stage = "" if record["stage"] == "immediate" else record["stage"] + "/"
        for kind in ("rewrite", "rephrase", "locality", "portability"):
            for score in SCORES:
                if kind not in score.kinds:
                    continue
                groups = defaultdict(list)
                for entry in record["probes"]:
                    if score.tasks and entry.get("task", {}).get("name") not in score.tasks:
                        continue
                    if entry["kind"] == kind and score.read(entry) is not None:
                        groups[entry["group"]].append(score.read(entry))
                if groups:
                    take = {"gen_any": max, "gen_all": min}.get(score.name, np.mean)
                    means = {group: take(values) for group, values in groups.items()}
                    cases[f"{stage}{kind}/{score.name}"].append(np.mean(list(means.values())))
                    for group, mean in means.items():
                        if group != kind:
                            cases[f"{stage}{kind}/{group}/{score.name}"].append(mean)
    return cases


@pytest.fixture
def records():
    return random_records(40, stages=("immediate", "after_20", "final"))


def test_every_key_agrees_with_its_definition(records):
    computed = EditMetrics.from_records(records).compute()
    expected = {key: np.mean(values) for key, values in reference(records).items()}
    scores = {
        key: value
        for key, value in computed.items()
        if not key.startswith(("forget/", "edit/", "timing/")) and not key.endswith("/p95")
    }
    assert scores == pytest.approx(expected)
    assert "final/locality/v1.5/known" in scores
    assert "after_20/portability/one_hop/gen_em" in scores


def test_a_case_counts_once_and_groups_weigh_alike():
    neighbours = [probe("locality", "neighborhood", {"kl": value}) for value in (0.0, 0.0, 3.0)]
    metrics = EditMetrics()
    metrics.update(example("1", [*neighbours, probe("locality", "other", {"kl": 4.0})]))
    metrics.update(example("2", [probe("locality", "other", {"kl": 6.0})]))
    computed = metrics.compute()
    assert computed["locality/neighborhood/kl"] == 1.0
    assert computed["locality/other/kl"] == 5.0
    assert computed["locality/kl"] == (2.5 + 6.0) / 2
    assert computed["locality/kl/p95"] == pytest.approx(2.5 + 0.95 * 3.5)
    assert {row.key: row.n for row in metrics.summary()} == {
        "locality/kl": 2,
        "locality/neighborhood/kl": 1,
        "locality/other/kl": 2,
    }


def test_known_asks_only_what_the_base_model_had_right():
    right, wrong = {"tf_all": True}, {"tf_all": False}
    metrics = EditMetrics()
    metrics.update(
        example(
            "1",
            [
                probe("locality", base=right, after=right),
                probe("locality", base=right, after=wrong),
                probe("locality", base=wrong, after=right),
                probe("locality", base=wrong, after=wrong),
            ],
        )
    )
    metrics.update(example("2", [probe("locality", base=wrong, after=wrong)]))
    assert metrics.compute()["locality/known"] == 0.5
    assert [row.n for row in metrics.summary() if row.key == "locality/known"] == [1]


def test_locality_compares_with_the_base_model_and_not_with_the_running_one():
    metrics = EditMetrics()
    drifted = {"text": "Lyon", "top1": [2]}
    metrics.update(
        example(
            "1",
            [probe("locality", base={"text": "Rome", "top1": [1]}, before=drifted, after=drifted)],
        )
    )
    computed = metrics.compute()
    assert computed["locality/keep_text"] == computed["locality/keep_top1"] == 0.0


def test_summary_gives_the_interval_of_each_metric(records):
    metrics = EditMetrics.from_records(records)
    by_key = metrics.by_key()
    computed = metrics.compute()
    rows = metrics.summary()
    assert len({row.key for row in rows}) == len(rows) > 50
    for row in rows:
        assert row.mean == computed[row.key]
        assert row.low <= row.mean <= row.high
        if not row.key.startswith("forget/"):
            cases = by_key[row.key].cases()
            interval = share_interval if by_key[row.key].is_share else bootstrap_interval
            expected = interval(cases.values, cases.clusters)
            assert (row.low, row.high) == pytest.approx(expected, rel=1e-12)
            assert row.n == len(cases.values)


def test_subjects_are_clusters():
    def metrics(subject):
        found = EditMetrics()
        for index in range(400):
            share = float(index % 2) if subject is None else float(index // 2 % 2)
            found.update(
                example(
                    str(index),
                    [probe("rewrite", after={"tf_tok": share})],
                    subject=subject and f"{subject} {index // 2}",
                )
            )
        (row,) = found.summary()
        assert row.mean == 0.5
        return row.high - row.low

    assert metrics("subject") == pytest.approx(2**0.5 * metrics(None), rel=0.1)


def test_a_results_file_gives_the_numbers_again(records, tmp_path):
    path = tmp_path / "results.jsonl"
    streamed = EditMetrics(resamples=500, seed=3)
    with path.open("w") as lines:
        for record in records:
            streamed.update(record)
            lines.write(json.dumps(record) + "\n")
    shuffled = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(0).shuffle(shuffled)
    again = EditMetrics.from_records(shuffled, resamples=500, seed=3)
    # costs aside, which count from a case's first record, order plays no part
    drop = ("edit/", "timing/")
    assert {k: v for k, v in again.compute().items() if not k.startswith(drop)} == {
        k: v for k, v in streamed.compute().items() if not k.startswith(drop)
    }
    assert [row for row in again.summary() if not row.key.startswith(drop)] == [
        row for row in streamed.summary() if not row.key.startswith(drop)
    ]


def test_forgetting_is_the_paired_loss_between_the_stages():
    metrics = EditMetrics()
    for name, share in (("1", 1.0), ("2", 0.5), ("3", 1.0)):
        metrics.update(example(name, [probe("rewrite", after={"tf_tok": share, "text": "Rome"})]))
    for name, share in (("3", 0.5), ("1", 0.25), ("4", 0.0)):
        metrics.update(
            example(name, [probe("rewrite", after={"tf_tok": share, "text": "x"})], "final")
        )
    computed = metrics.compute()
    assert computed["forget/rewrite/tf_tok"] == pytest.approx((0.75 + 0.5) / 2)
    assert computed["forget/rewrite/gen_em"] == 1.0
    assert computed["rewrite/tf_tok"] == pytest.approx(2.5 / 3)
    assert computed["final/rewrite/tf_tok"] == pytest.approx(0.25)
    assert "forget/rewrite/inflation" not in computed
    (row,) = [row for row in metrics.summary() if row.key == "forget/rewrite/tf_tok"]
    assert (row.n, row.low, row.high) == (2, 0.5, 0.75)


def test_a_loss_that_all_cases_share_is_not_certain():
    metrics = EditMetrics()
    for stage in ("immediate", "final"):
        for name in ("1", "2"):
            metrics.update(example(name, [probe("rewrite", after={"tf_tok": 1.0})], stage))
    (row,) = [row for row in metrics.summary() if row.key == "forget/rewrite/tf_tok"]
    assert row.mean == 0.0
    assert (row.low, row.high) == square_and_add_interval(0.0, 2)
    metric, _ = metrics.gathered()["forget/rewrite/tf_tok"]
    assert metric.is_share


def test_nothing_is_forgotten_where_stages_share_no_case():
    metrics = EditMetrics()
    metrics.update(example("1", [probe("rewrite", after={"tf_tok": 1.0})]))
    metrics.update(example("2", [probe("rewrite", after={"tf_tok": 1.0})], "final"))
    assert not [key for key in metrics.compute() if key.startswith("forget/")]


def test_costs_count_once_a_case():
    metrics = EditMetrics()
    for name, seconds in (("1", 1.0), ("2", 2.0), ("3", 6.0)):
        costs = {
            "edit": {"bytes": 10, "rank": None},
            "timing": {"edit_seconds": seconds},
            "memory": {"measured": True},
        }
        metrics.update(example(name, [], **costs))
        metrics.update(example(name, [], "final", **costs))
    assert metrics.compute() == {
        "edit/bytes": 10.0,
        "edit/bytes/median": 10.0,
        "edit/bytes/p95": 10.0,
        "timing/edit_seconds": 3.0,
        "timing/edit_seconds/median": 2.0,
        "timing/edit_seconds/p95": pytest.approx(5.6),
    }


def test_an_example_scored_twice_is_named():
    metrics = EditMetrics()
    metrics.update(example("case 7", []))
    metrics.update(example("case 7", [], "final"))
    with pytest.raises(InvalidRequestError, match=r"'case 7'.*'final'"):
        metrics.update(example("case 7", [], "final"))
    metrics.reset()
    metrics.update(example("case 7", [], "final"))
    assert metrics.compute() == {}
    assert metrics.summary() == []


@pytest.mark.parametrize("scorer", [EditMetrics, LegacyEasyEdit])
def test_an_unknown_stage_is_named(scorer):
    with pytest.raises(KEditError, match=r"example '1': field 'stage' .*'later'"):
        scorer().update(example("1", [], "later"))


LEGACY = [
    example(
        "1",
        [
            probe("rewrite", after={"tf_tok": 1.0}, base={"tf_tok": 0.0}),
            probe("rewrite", after={"tf_tok": 0.5}, base={"tf_tok": 0.0}),
            probe("rephrase", after={"tf_tok": 0.5}, base={"tf_tok": 0.25}),
            probe("locality", "near", base={"top1": [1, 2, 3, 4]}, after={"top1": [1, 2, 3, 9]}),
            probe("locality", "near", base={"top1": [5]}, after={"top1": [5]}),
            probe("locality", "far", base={"top1": [1, 2]}, after={"top1": [2, 1]}),
            probe("portability", "one_hop", after={"tf_tok": 0.5}, base={"tf_tok": 0.5}),
        ],
    ),
    example(
        "2",
        [
            probe("rewrite", after={"tf_tok": 0.0}, base={"tf_tok": 0.5}),
            probe("rephrase", after={"tf_tok": float("nan")}),  # an empty target
            probe("locality", "near", base={"top1": [1, 2]}, after={"top1": [1, 9]}),
            probe("locality", "near", base={"top1": []}, after={"top1": []}),
            probe("portability", "one_hop", after={"tf_tok": 1.0}),
            probe("portability", "alias", after={"tf_tok": 0.0}),
        ],
    ),
]


def test_legacy_keys_on_cases_worked_out_by_hand():
    assert LegacyEasyEdit.from_records(LEGACY).compute() == pytest.approx(
        {
            "rewrite_acc": (0.75 + 0.0) / 2,
            "rephrase_acc": 0.5,
            "locality/near_acc": (0.875 + 0.5) / 2,
            "locality/far_acc": 0.0,
            "locality": ((0.875 + 0.0) / 2 + 0.5) / 2,
            "portability/one_hop_acc": (0.5 + 1.0) / 2,
            "portability/alias_acc": 0.0,
            "portability": (0.5 + (1.0 + 0.0) / 2) / 2,
            "pre/rewrite_acc": 0.25,
            "pre/rephrase_acc": 0.25,
            "pre/portability": 0.5,
            "pre/portability/one_hop_acc": 0.5,
        }
    )


def test_legacy_stages_have_prefixes_and_streams_equal_files():
    records = random_records(20, stages=("immediate", "final"))
    streamed = LegacyEasyEdit()
    for record in records:
        streamed.update(record)
    again = LegacyEasyEdit.from_records(json.loads(json.dumps(records))[::-1])
    assert again.compute() == streamed.compute()
    assert again.summary() == streamed.summary()
    keys = set(streamed.compute())
    assert {"final/rewrite_acc", "final/locality/v1.5_acc", "pre/rewrite_acc"} <= keys
    assert not [key for key in keys if key.startswith(("pre/final", "final/pre"))]


def test_legacy_refuses_ids_that_cannot_be_compared():
    record = example("1", [probe("locality", base={"top1": [1]}, after={"top1": [1, 2]})])
    with pytest.raises(InvalidRequestError, match="'top1'"):
        LegacyEasyEdit().update(record)


def summary_metrics(samples):
    """The incumbent's summary: mean over samples of each sample's mean, as its code reads."""
    means = {}
    for key in ("rewrite_acc", "rephrase_acc"):
        means[key] = np.mean([np.mean(sample[key]) for sample in samples])
    for key in ("locality", "portability"):
        means[key] = {}
        for group in {group for sample in samples for group in sample[key]}:
            values = [np.mean(sample[key][group]) for sample in samples if group in sample[key]]
            means[key][group] = np.mean(values)
    return means


def test_legacy_scores_agree_with_the_incumbents_summary():
    generator = torch.Generator().manual_seed(0)

    def match(kind, count, group=None):
        """Probes of a kind, and the shares of their answers' tokens that are arg-max."""
        shares = torch.rand(count, generator=generator).tolist()
        return [probe(kind, group, {"tf_tok": share}) for share in shares], shares

    def unchanged(group, count):
        """Locality probes, and the shares of arg-max ids that are the same before and after."""
        probes, shares = [], []
        for length in (4, 2, 1)[:count]:
            before, after = torch.randint(3, (2, length), generator=generator).tolist()
            probes.append(probe("locality", group, {"top1": after}, {"top1": before}))
            shares.append(np.mean([a == b for a, b in zip(after, before, strict=True)]))
        return probes, shares

    records, samples = [], []
    for index in range(6):
        parts = {
            "rewrite_acc": match("rewrite", 1),
            "rephrase_acc": match("rephrase", 2),
            "locality/near_acc": unchanged("near", 1 + index % 3),
            "locality/far_acc": unchanged("far", 1),
        }
        if index % 2:
            parts["portability/hop_acc"] = match("portability", 2, "hop")
        records.append(example(str(index), [p for probes, _ in parts.values() for p in probes]))
        sample = {"locality": {}, "portability": {}}
        for key, (_, shares) in parts.items():
            kind, _, group = key.partition("/")
            if group:
                sample[kind][group] = shares
            else:
                sample[kind] = shares
        samples.append(sample)
    found, expected = LegacyEasyEdit.from_records(records).compute(), summary_metrics(samples)
    assert len(expected["locality"]) == 2
    for kind in ("locality", "portability"):
        for group, value in expected.pop(kind).items():
            assert found[f"{kind}/{group}"] == pytest.approx(value)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value)


def test_legacy_locality_is_the_share_of_positions_before_and_after():
    before, after = [1, 2, 3], [1, 9, 9]
    for positions, share in (([0, 1], 0.5), ([2], 0.0), ([], None)):
        base, edited = ({"top1": [ids[i] for i in positions]} for ids in (before, after))
        record = example("1", [probe("locality", "g", base=base, after=edited)])
        found = LegacyEasyEdit.from_records([record]).compute()
        assert found == ({} if share is None else {"locality": share, "locality/g_acc": share})
