"""Metrics over cases: values, intervals, devices, dtypes, several processes."""

import copy
import math
import pickle
from datetime import timedelta

import pytest
import torch
from metric_records import example, probe, random_records
from torch import nn

from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.metrics import (
    ANSWER_SCORES,
    GENERATION_SCORES,
    LOCALITY_SCORES,
    PASSAGE_SCORES,
    TASK_SCORES,
    AllWordings,
    AnswerOverlap,
    AnyWording,
    BaseKL,
    CaseMean,
    CostMean,
    EditMetrics,
    ExactMatch,
    GenerationContains,
    GenerationExact,
    Inflation,
    InstanceUnparsed,
    NegativeLogLikelihood,
    ProbabilityPreference,
    Repetition,
    RunOn,
    StillKnown,
    TokenMatch,
    UnchangedText,
    UnchangedTop1,
    name_id,
)
from kedit_lightning.metrics.functional import bootstrap_interval, wilson_interval


@pytest.mark.parametrize(
    ("score", "base", "after", "expected"),
    [
        (TokenMatch, {"tf_tok": 1.0}, {"tf_tok": 0.5}, 0.5),
        (ExactMatch, {"tf_all": False}, {"tf_all": True}, 1.0),
        (ExactMatch, {"tf_all": True}, {"tf_all": False}, 0.0),
        (ProbabilityPreference, {}, {"log_prob": -1.0, "contrast_log_prob": -2.0}, 1.0),
        (ProbabilityPreference, {}, {"log_prob": -2.0, "contrast_log_prob": -2.0}, 0.0),
        (ProbabilityPreference, {}, {"log_prob": -2.0, "contrast_log_prob": None}, None),
        (GenerationExact, {"text": "Paris"}, {"text": " Rome. It"}, 1.0),
        (GenerationExact, {"text": "Rome"}, {"text": "in Rome"}, 0.0),
        (GenerationContains, {"text": "Paris"}, {"text": "in Rome"}, 1.0),
        (GenerationContains, {"text": "Rome"}, {"text": "not in Rome"}, 0.0),
        (NegativeLogLikelihood, {}, {"log_prob": -1.5}, 1.5),
        (AnswerOverlap, {}, {"text": "in Rome. It"}, 2 / 3),
        (AnswerOverlap, {}, {"text": "in Milan"}, 0.0),
        (RunOn, {}, {"text": "Rome and Milan"}, 1.0),
        (RunOn, {}, {"text": "Rome. It is big"}, 0.0),
        (RunOn, {}, {"text": "in Rome and Milan"}, 0.0),
        (Repetition, {}, {"text": "a b c a b c"}, 0.25),
        (Repetition, {}, {"text": "a b"}, 0.0),
        (AnyWording, {}, {"text": "in Rome"}, 1.0),
        (AllWordings, {}, {"text": "not in Rome"}, 0.0),
        (Inflation, {}, {"tf_tok": 1.0, "text": "in Rome"}, 1.0),
        (Inflation, {}, {"tf_tok": 0.5, "text": "Rome"}, -0.5),
        (Inflation, {}, {"tf_tok": 0.5, "text": None}, None),
        (UnchangedText, {"text": "Rome"}, {"text": "Rome"}, 1.0),
        (UnchangedText, {"text": "Rome"}, {"text": "Rome."}, 0.0),
        (UnchangedText, {"text": ""}, {"text": ""}, 1.0),
        (UnchangedText, {}, {"text": "Rome"}, None),
        (UnchangedTop1, {"top1": [1, 2]}, {"top1": [1, 2]}, 1.0),
        (UnchangedTop1, {"top1": [1, 2]}, {"top1": [1, 3]}, 0.0),
        (UnchangedTop1, {"top1": []}, {"top1": []}, None),
        (BaseKL, {"kl": 3.0}, {"kl": 0.0}, 0.0),
        (StillKnown, {"tf_all": True}, {"tf_all": True}, 1.0),
        (StillKnown, {"tf_all": True}, {"tf_all": False}, 0.0),
        (StillKnown, {"tf_all": False}, {"tf_all": True}, None),
        (StillKnown, {}, {"tf_all": True}, None),
    ],
)
def test_what_each_score_reads(score, base, after, expected):
    # the model just before the edit is no party to any of them
    record = probe("rewrite", base=base, after=after, before={"tf_all": None, "text": "before"})
    assert score.read(record) == expected


SCORES = [*ANSWER_SCORES, *GENERATION_SCORES, *LOCALITY_SCORES, *PASSAGE_SCORES, *TASK_SCORES]


@pytest.mark.parametrize("score", SCORES)
def test_scores_leave_out_what_was_not_measured(score):
    record = probe("rewrite") | ({"task": {"name": score.tasks[0]}} if score.tasks else {})
    assert score.read(record) is None
    assert score.case_value([record]) is None
    assert score.case_value([]) is None
    assert score.full_state_update is False
    less = (Inflation, BaseKL, NegativeLogLikelihood, RunOn, Repetition, InstanceUnparsed)
    assert score.higher_is_better is (score not in less)


def test_generation_needs_an_answer_to_compare_with():
    record = probe("locality", after={"text": "Rome"}, answers=())
    assert GenerationExact.read(record) is None
    assert GenerationContains.read(record) is None


def test_a_case_counts_once_however_many_probes_it_has():
    shares = [{"tf_tok": 1.0}, {"tf_tok": 0.5}, {}]
    assert TokenMatch.case_value([probe("rewrite", after=share) for share in shares]) == 0.75


def test_one_wording_of_three_is_enough_or_all_are_asked_for():
    """MQuAKE counts a question as answered when any of its wordings is."""
    texts = ["in Milan", "It is Rome.", None]
    probes = [probe("portability", after={"text": text}) for text in texts]
    assert AnyWording.case_value(probes) == 1.0
    assert AllWordings.case_value(probes) == 0.0
    assert AllWordings.case_value(probes[1:]) == 1.0
    assert AnyWording.case_value(probes[2:]) is None


def test_mean_and_interval():
    values = torch.rand(300, generator=torch.Generator().manual_seed(0)).double()
    clusters = torch.arange(300) // 3
    metric = CaseMean()
    for begin in range(0, 300, 1):  # far more pieces than are kept apart
        metric.update(values[begin : begin + 1], clusters[begin : begin + 1])
    assert metric.compute().item() == pytest.approx(values.mean().item(), abs=1e-7)
    assert metric.interval() == bootstrap_interval(values, clusters)
    assert len(metric.rows) < 100
    metric.reset()
    assert metric.interval() == pytest.approx((math.nan, math.nan), nan_ok=True)


def test_shares_are_honest_at_the_border_and_costs_are_not_shares():
    share, cost = TokenMatch(), CostMean()
    share.update([1.0] * 30)
    cost.update([1.0] * 30)
    assert share.interval() == wilson_interval(1.0, 30)
    assert cost.interval() == (1.0, 1.0)


def test_cost_has_a_median_and_a_tail():
    cost = CostMean()
    cost.update([1.0, 2.0, 3.0, 4.0, 90.0])
    assert cost.compute().item() == 20.0
    assert cost.extras(cost.cases().values) == {"median": 3.0, "p95": pytest.approx(72.8)}


def test_order_of_cases_changes_no_bit():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
    ids = torch.tensor([name_id(str(index)) for index in range(50)])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    one, other = CaseMean(), CaseMean()
    one.update(values, ids // 1000, ids)
    other.update(values[order], (ids // 1000)[order], ids[order])
    assert one.interval() == other.interval()
    assert torch.equal(one.cases().values, other.cases().values)


def test_cases_without_a_cluster_are_clusters_of_their_own():
    named, unnamed = CaseMean(), CaseMean()
    named.update([0.0, 1.0, 0.5], None, [5, 6, 7])
    unnamed.update([0.0, 1.0, 0.5])
    assert len(named.cases().clusters.unique()) == len(unnamed.cases().clusters.unique()) == 3


def test_a_case_counted_twice_is_refused():
    metric = CaseMean()
    metric.update([1.0, 1.0], None, [5, 5])
    with pytest.raises(InvalidRequestError, match="1 cases were counted more than once"):
        metric.compute()


@pytest.mark.parametrize("ids", ["clusters", "cases"])
def test_ids_must_fit_the_values(ids):
    with pytest.raises(ValueError, match=ids):
        CaseMean().update([1.0, 2.0], **{ids: [1]})


def test_precision_of_the_model_does_not_reach_the_states():
    owner = nn.Module()
    owner.metric = CaseMean()
    owner.metric.update([1 / 3, 1e-9], None, [name_id("a"), name_id("b")])
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()):
        moved = cast(copy.deepcopy(owner)).metric
        moved.update([1 / 7], None, [name_id("c")])
        values = sorted(moved.cases().values.tolist())
        assert values == [1e-9, 1 / 7, 1 / 3]
    assert not owner.state_dict()


def test_pickled_and_forwarded_metrics_go_on():
    metric = TokenMatch(resamples=100, seed=4)
    assert metric([1.0, 0.0]).item() == 0.5  # forward: the value of this batch
    metric([1.0, 1.0])
    again = pickle.loads(pickle.dumps(metric))
    assert again.compute().item() == metric.compute().item() == 0.75
    assert again.interval() == metric.interval()


def test_names_have_numbers_that_never_change():
    assert name_id("Eiffel Tower") == 3871578600075813371
    assert name_id(None) == -1
    ids = {name_id(str(index)) for index in range(2000)}
    assert len(ids) == 2000
    assert all(0 <= number < 2**63 for number in ids)


def _process(rank, folder, records):
    """One of two processes: uneven shares, keys the other lacks, and a metric without cases."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    mean = CaseMean()
    if rank == 0:
        mean.update([1.0, 0.0, 1.0], [1, 1, 2], [11, 12, 13])
    first = mean.compute().item(), mean.interval(), mean.cases().ids.tolist()
    kept = len(mean.rows)  # gathering leaves the own share as it was
    mean.update([0.5], [2], [20 + rank])
    second = mean.compute().item()
    metrics = EditMetrics()
    for record in records[:5] if rank == 0 else records[5:]:
        metrics.update(record)
    alone = EditMetrics.from_records(records[:3]) if rank == 0 else None  # asks nobody
    torch.save(
        {
            "first": first,
            "kept": kept,
            "second": second,
            "computed": metrics.compute(),
            "summary": metrics.summary(),
            "alone": alone and alone.compute(),
        },
        f"{folder}/{rank}.pt",
    )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    records = random_records(12)
    records[7]["probes"].append(probe("portability", "two_hop", after={"tf_tok": 1.0}))
    torch.multiprocessing.spawn(_process, (str(tmp_path), records), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    one = EditMetrics.from_records(records)
    for rank, result in enumerate(results):
        assert result["first"] == (
            pytest.approx(2 / 3),
            bootstrap_interval([1.0, 0.0, 1.0], [1, 1, 2]),
            [11, 12, 13],
        )
        assert result["kept"] == 1
        assert result["second"] == pytest.approx(0.6)
        assert result["computed"] == one.compute()
        assert result["summary"] == one.summary()
        assert (result["alone"] is None) == (rank == 1)


def test_metrics_live_in_a_lightning_module():
    from lightning.pytorch import LightningModule

    class Owner(LightningModule):
        def __init__(self):
            super().__init__()
            self.scores = EditMetrics()

    owner = Owner()
    owner.scores.update(example("1", [probe("rewrite", after={"tf_tok": 0.25})]))
    owner.to(torch.bfloat16)
    owner.scores.update(example("2", [probe("rewrite", after={"tf_tok": 0.5})]))
    assert owner.scores.compute() == {"rewrite/tf_tok": 0.375}
    assert owner.state_dict() == {}
    owner.to("meta")
    assert owner.scores.metric("rewrite/tf_all", ExactMatch).device.type == "meta"
