"""Scores of concepts, worked out by hand and on models whose answers are known."""

import json
import math

import pytest
from metric_records import example, probe
from places import SAMPLES
from scripted_model import scripted_model
from support import tiny_base
from toys import Toy

from kedit_lightning import BaseModel, EditTrainer, Probe
from kedit_lightning.benchmark import Protocol, Reader
from kedit_lightning.data import ConceptEdit
from kedit_lightning.methods import PROMPT
from kedit_lightning.metrics import (
    ConsistencyCosine,
    ConsistencyJudged,
    EditMetrics,
    InstanceShift,
)
from kedit_lightning.metrics.functional import share_of_yes, yes_or_no
from kedit_lightning.probe_task import ProbeTask

BELONGS = ProbeTask("instance", "inter", against=("No", "no"), apart=True)
INTER = SAMPLES / "published" / "final_gpt2_inter.json"
YES, NO, NEITHER = (
    {"right_greedy": [yes, False], "wrong_greedy": [no, False]}
    for yes, no in ((True, False), (False, True), (False, False))
)


def instance(before, after):
    record = probe("portability", "instance", after, before, answers=("Yes", "yes"))
    return record | {"task": BELONGS.to_json()}


def scores(*records):
    return EditMetrics.from_records([example("1", list(records))]).compute()


def test_both_directions_and_what_is_neither_worked_out_by_hand():
    found = scores(
        instance(YES, NO), instance(YES, YES), instance(YES, NO), instance(NO, YES),
        instance(NO, NO), instance(YES, NEITHER), instance(NEITHER, YES),
    )  # fmt: skip
    parsed = {name.removeprefix("portability/instance_"): v for name, v in found.items()}
    assert parsed["change"] == pytest.approx(3 / 5)  # of five with an answer before and after
    assert parsed["to_no"] == pytest.approx(2 / 3)
    assert parsed["to_yes"] == pytest.approx(1 / 2)
    assert parsed["unparsed"] == pytest.approx(1 / 7)
    # No other metric scores questions about instances.
    assert all("/instance" in name for name in found)


def test_a_change_is_absent_where_nothing_was_said():
    found = scores(instance(NEITHER, NEITHER), instance(NEITHER, NO))
    assert found["portability/instance_unparsed"] == 0.5
    assert "portability/instance_change" not in found
    assert "portability/instance_to_no" not in found
    assert yes_or_no([True], [True]) is None  # no answer is both


def test_the_probability_of_yes_moves_by_both_forms():
    def logs(*shares):
        return [math.log(share) for share in shares]

    assert share_of_yes(logs(0.3, 0.1), logs(0.05, 0.05)) == pytest.approx(0.8)
    before = {"right_log_probs": logs(0.3, 0.1), "wrong_log_probs": logs(0.05, 0.05)}
    after = {"right_log_probs": logs(0.01, 0.01), "wrong_log_probs": logs(0.1, 0.08)}
    assert InstanceShift.read(instance(before, after)) == pytest.approx(0.7)
    assert InstanceShift.read(instance(before, before)) == 0.0
    assert InstanceShift.read(instance(before, {})) is None
    assert share_of_yes([-2000.0], [-2001.0]) == pytest.approx(1 / (1 + math.exp(-1)))


def test_consistency_names_who_measured_it():
    record = probe("rewrite", after={"passage": "a tower", "cosine": 0.25, "judged": True})
    record |= {"task": ProbeTask("concept").to_json()}
    assert ConsistencyCosine.read(record) == 0.25
    assert ConsistencyJudged.read(record) == 1.0
    found = scores(record)
    assert found["rewrite/consistency_cosine"] == 0.25
    assert "rewrite/gen_cosine" not in found
    absent = scores(probe("rewrite", after={"passage": "a"}) | {"task": {"name": "concept"}})
    assert not any("consistency" in name for name in absent)


def asked(prompt):
    return Probe("portability", prompt, ("Yes", "yes"), "instance", task=BELONGS)


def test_logits_say_what_greedy_decoding_says():
    """Of a model that says yes, one that says no, and one that says something else."""
    script = {"Is it so:": " yes", "Is it so?": " No", "Is it so;": " maybe"}
    for prompt, reply in script.items():
        base = BaseModel(*scripted_model({prompt: reply}), name="scripted")
        (reading,) = Reader(base, Protocol(max_new_tokens=3)).base_readings([asked(prompt)])
        said = base.generate([prompt], 8)[0].strip().lower()
        found = yes_or_no(reading["right_greedy"], reading["wrong_greedy"])
        assert found == {"yes": True, "no": False}.get(said)
        assert reading["text"] is None  # nothing is generated for it


def test_answers_do_not_depend_on_padding_batch_or_order():
    base = tiny_base("llama")
    probes = [asked("Whether Rome belongs to category city?"), asked("Whether it"), asked("Is")]
    expected = None
    for side, size, order in (("right", 1, 1), ("left", 32, -1)):
        base.padding_side = side
        reader = Reader(base, Protocol(score_batch_size=size, max_new_tokens=2), side)
        found = reader.base_readings(probes[::order])[::order]
        values = [[*r["right_log_probs"], *r["wrong_log_probs"]] for r in found]
        expected = expected or values
        assert values == [pytest.approx(row, abs=1e-9) for row in expected]
    with Toy(base_model=base).edit(ConceptEdit(path=INTER).examples()[0].requests):
        edited = reader.readings(probes, found)
        assert edited[0]["right_log_probs"] != found[0]["right_log_probs"]


def test_an_edit_that_does_nothing_gives_neutral_values(tmp_path):
    """The statement of an empty template is no statement."""
    base = tiny_base("llama", max_position_embeddings=512)
    method = PROMPT(base_model=base, template="")
    trainer = EditTrainer(
        protocol=Protocol(max_new_tokens=3), accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="left out") as told:
        trainer.test(method, ConceptEdit(path=INTER), verbose=False, output=tmp_path)
    said = " ".join(str(one.message) for one in told)
    assert "consistency_cosine is left out" in said
    assert "consistency_judge is left out" in said
    found = json.loads((tmp_path / "results.json").read_text())["scores"]
    mean = {name: value["mean"] for name, value in found.items()}
    assert mean["portability/instance_shift"] == 0.0
    assert mean.get("portability/instance_change", 0.0) == 0.0
    assert mean["locality/keep_top1"] == mean["locality/keep_text"] == 1.0
    assert mean["locality/kl"] == 0.0
    stated = PROMPT(base_model=base, template="Definition of {subject}: {target}\n")
    request = ConceptEdit(path=INTER).examples()[0].requests[0]
    assert stated.statement_of(request).statement == (
        "Definition of lighthouse: a company that carries passengers by air.\n"
    )
