"""Metrics come from the registry, declare what is measured, and a plug-in adds its own."""

import json
import sys
import traceback
from importlib.metadata import EntryPoint

import pytest
import torch
from places import ROOT, SAMPLES
from support import REQUESTS, tiny_base
from toys import Toy

from kedit_lightning import BaseModel, EditTrainer, Probe, registry
from kedit_lightning.benchmark import Protocol, Reader
from kedit_lightning.data import Requests
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.metrics import (
    ANSWER_SCORES,
    FLUENCY_SCORES,
    GENERATION_SCORES,
    LOCALITY_SCORES,
    PASSAGE_SCORES,
    SCORINGS,
    TASK_SCORES,
    EditMetrics,
    ExactMatch,
    Measurement,
    ProbeMean,
    ProbeReading,
    TokenMatch,
)
from kedit_lightning.metrics.measurement import KL, TOP1, built_in

EXAMPLES = ROOT / "examples"
SHORT = Protocol(max_new_tokens=4)
PROBES = [
    Probe("rewrite", "Amber Falls lies in", ("Norway", "Italy"), contrast="Berlin"),
    Probe("rephrase", "Amber Falls lies in", ("Norway", "Italy"), contrast="Berlin"),
    Probe("locality", "Rome is the capital of", ("Italy",), "neighborhood"),
]


@pytest.fixture
def plugin(monkeypatch):
    """The example's metric, loaded as the command line loads plug-ins."""
    monkeypatch.syspath_prepend(EXAMPLES)
    point = EntryPoint("certainty", "metric_plugin", "kedit_lightning.plugins")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    monkeypatch.delitem(sys.modules, "metric_plugin", raising=False)
    assert registry.load_plugins() == ["metric_plugin"]
    module = sys.modules["metric_plugin"]
    yield module
    registry.unregister(module.ENTRY)


@pytest.fixture
def register(monkeypatch):
    """Registers a metric class of this test for its duration."""
    added = []

    def add(score):
        monkeypatch.setattr(sys.modules[__name__], score.__name__, score, raising=False)
        added.append(registry.register(registry.Entry("metric", score.__name__, __name__, "")))
        return score

    yield add
    for entry in added:
        registry.unregister(entry)


def run(folder):
    toy = Toy(base_model=tiny_base("llama"))
    trainer = EditTrainer(
        protocol=SHORT, accelerator="cpu", enable_model_summary=False, enable_progress_bar=False
    )
    data = Requests(path=SAMPLES / "facts.json", limit=3)
    trainer.test(toy, data, verbose=False, output=folder)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    scores = json.loads((folder / "results.json").read_text())["scores"]
    return {row.key: row for row in toy.summary}, lines, scores


def test_the_registry_holds_the_exported_metrics():
    exported = {*ANSWER_SCORES, *GENERATION_SCORES, *LOCALITY_SCORES}
    assert set(EditMetrics.scores()) == exported | {*PASSAGE_SCORES, *TASK_SCORES, *FLUENCY_SCORES}
    for kind, measurements in EditMetrics.measurements().items():
        # A sample is measured only where the protocol asks for one.
        always = tuple(m.name for m in measurements if m.source != "sample")
        assert always == built_in(kind)
    assert set(built_in("locality")) == set(ProbeReading.__annotations__)
    legacy = SCORINGS["legacy_easyedit"].measurements()
    assert [m.name for m in legacy["locality"]] == list(built_in("locality")[:-1])
    assert {m.source for m in legacy["locality"]}.isdisjoint({"continuation"})


def test_a_plug_in_scores_with_a_measurement_of_its_own(plugin, tmp_path):
    assert len((EXAMPLES / "metric_plugin.py").read_text().splitlines()) <= 40
    summary, lines, scores = run(tmp_path / "with")
    row = summary["rewrite/entropy"]
    assert 0 < row.low < row.mean < row.high
    assert row.n == 3
    assert scores["rewrite/entropy"]["mean"] == row.mean
    rewrites = [p for line in lines for p in line["probes"] if p["kind"] == "rewrite"]
    measured = [probe["after"]["first_token_entropy"] for probe in rewrites]
    assert row.mean == pytest.approx(sum(measured) / 3)
    # It is that of the base model, and of the edited one, as measured without the reader.
    base = tiny_base("llama")
    rows = base.rows([rewrites[0]["prompt"]])
    logits = base.logits_at(rows, rows.prompt_end[:, None])[0, 0]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert rewrites[0]["base"]["first_token_entropy"] == pytest.approx(entropy.item())
    assert measured[0] != rewrites[0]["base"]["first_token_entropy"]
    kinds = {
        p["kind"] for line in lines for p in line["probes"] if "first_token_entropy" in p["after"]
    }
    assert kinds == {"rewrite", "rephrase"} & {p["kind"] for line in lines for p in line["probes"]}

    registry.unregister(plugin.ENTRY)
    without, plain, _ = run(tmp_path / "without")
    registry.register(plugin.ENTRY)
    assert "rewrite/entropy" not in without
    for line, other in zip(lines, plain, strict=True):
        for probe, expected in zip(line["probes"], other["probes"], strict=True):
            for state in ("base", "before", "after"):
                probe[state].pop("first_token_entropy", None)
                assert probe[state] == expected[state]
    for key, row in without.items():
        assert summary[key][1:] == row[1:] or key.startswith(("timing/", "memory/"))


def test_the_cache_tells_measured_sets_apart(plugin):
    base = tiny_base("llama")
    registry.unregister(plugin.ENTRY)
    plain = Reader(base, SHORT).base_readings(PROBES)
    registry.register(plugin.ENTRY)
    reader = Reader(base, SHORT)
    assert reader.cache.path == Reader(base, SHORT).cache.path
    assert len(reader.cache.known) == 2  # rewrite and rephrase ask the same
    rewrite, rephrase, locality = reader.base_readings(PROBES)
    assert len(reader.cache.known) == 3
    assert {*rewrite} - {*plain[0]} == {*rephrase} - {*plain[1]} == {"first_token_entropy"}
    assert locality == plain[2]


def test_probes_of_one_question_but_another_kind_have_readings_of_their_own(register):
    @register
    class RewriteKL(ProbeMean):
        name, kinds, measurements = "kl", ("rewrite",), (KL, TOP1)

    base = tiny_base("llama")
    reader = Reader(base, SHORT)
    before = reader.base_readings(PROBES)
    assert list(before[0]) == [*built_in("rewrite"), "kl", "top1"]
    assert list(before[1]) == list(built_in("rewrite"))
    assert list(before[2]) == list(built_in("locality"))
    with Toy(base_model=base).edit(REQUESTS[3:]):
        after = reader.readings(PROBES, before)
    assert after[0]["kl"] > before[0]["kl"] == 0.0
    assert after[0]["top1"][0] != before[0]["top1"][0]


def test_names_that_are_taken_are_refused(register):
    class OtherLogProb(ProbeMean):
        name, kinds = "other", ("rewrite",)
        measurements = (Measurement("log_prob", "answer", lambda forward: []),)

    register(OtherLogProb)
    with pytest.raises(UnsupportedUseError, match=r"'log_prob' of metric OtherLogProb"):
        Reader(tiny_base("llama"), SHORT)

    metrics = EditMetrics()
    metrics.metric("rewrite/tf_tok", TokenMatch)
    with pytest.raises(UnsupportedUseError, match=r"TokenMatch and ExactMatch .*rewrite/tf_tok"):
        metrics.metric("rewrite/tf_tok", ExactMatch)


@pytest.mark.parametrize("carry", [False, True])
def test_few_calls_lie_between_a_reading_and_its_forward_pass(monkeypatch, carry):
    base = tiny_base("llama")
    reader = Reader(base, SHORT)
    before = reader.base_readings(PROBES)
    between = []
    original = BaseModel.logits_at

    def logits_at(self, rows, columns, **options):
        names = [
            frame.name for frame in traceback.extract_stack() if "kedit_lightning" in frame.filename
        ]
        between.append(names)
        return original(self, rows, columns, **options)

    edit = Toy(base_model=base).edit(REQUESTS[:1])
    monkeypatch.setattr(BaseModel, "logits_at", logits_at)
    if carry:
        reader.readings(PROBES, before, [edit] * len(PROBES))
    else:
        with edit:
            reader.readings(PROBES, before)
    assert len(between) == 3  # answers; continuations, edited and not
    assert all(names[:2] == ["readings", "_read"] and len(names) <= 3 for names in between)
