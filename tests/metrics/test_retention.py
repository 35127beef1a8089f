"""What a stream keeps: matrix, age curve and collapse point of streams with known answers."""

import pytest
from metric_records import example, probe

from kedit_lightning.benchmark import Protocol
from kedit_lightning.metrics.retention import collapse_point, written_at
from kedit_lightning.runs.results import summary_of

#: Whether fact 1 to 5 holds: right after its edit, and when it is asked again.
HELD = {
    "immediate": [True, True, True, False, True],
    "after_1": [True],
    "after_2": [True, True],
    "final": [False, True, True, False, True],
}


def stream(held, chunk_size=1, names="abcde"):
    records = []
    for stage, outcomes in held.items():
        for name, holds in zip(names, outcomes, strict=False):
            reading = {"tf_all": holds, "tf_tok": float(holds), "text": "Rome" if holds else "Oslo"}
            records.append(example(name, [probe("rewrite", after=reading)], stage, subject=name))
    protocol = Protocol(mode="sequential", every="log", chunk_size=chunk_size)
    return summary_of(records, protocol, 0)["retention"]


def test_the_matrix_has_a_row_for_each_checkpoint_and_a_column_for_each_cohort():
    found = stream(HELD)
    assert found["checkpoints"] == [1, 2, 5]
    score = found["scores"]["rewrite/tf_all"]
    assert score["matrix"] == [[1.0, None, None], [1.0, 1.0, None], [0.0, 1.0, 2 / 3]]
    assert score["immediate"] == [1.0, 1.0, 2 / 3]
    assert score["ends"] == {"facts": 2, "first": 0.5, "last": 0.5}
    assert found["composite"] == pytest.approx([1.0, 1.0, 0.6])
    assert set(found["scores"]) == {"rewrite/tf_all", "rewrite/gen_em"}


def test_the_age_curve_counts_facts_written_since():
    """Asked on the stack of its own edit once more, a fact counts once."""
    age = stream(HELD)["scores"]["rewrite/tf_all"]["age"]
    by_age = {(bin["from"], bin["to"]): (bin["n"], bin["mean"]) for bin in age}
    # age 0: all five; 1: the first after two, the fourth at the end; 2: the third;
    # 3 and 4: the second and the first at the end.
    assert by_age == {(0, 0): (5, 0.8), (1, 1): (2, 0.5), (2, 2): (1, 1.0), (3, 5): (2, 0.5)}
    assert all(bin["low"] <= bin["mean"] <= bin["high"] for bin in age)


def test_facts_of_one_edit_have_one_age():
    held = {"after_2": [True, True], "after_4": [True, False, True, True], "final": [False] * 5}
    assert [written_at(place, 2, 5) for place in range(1, 6)] == [2, 2, 4, 4, 5]
    score = stream(held, chunk_size=2)["scores"]["rewrite/tf_all"]
    assert score["immediate"] == [None] * 3
    by_age = {(bin["from"], bin["to"]): (bin["n"], bin["mean"]) for bin in score["age"]}
    assert by_age == {(0, 0): (5, 0.8), (1, 2): (4, 0.25), (3, 4): (2, 0.0)}


@pytest.mark.parametrize("stages", [["immediate"], ["immediate", "final"]])
def test_facts_that_are_never_asked_again_have_no_retention(stages):
    assert stream({stage: HELD[stage] for stage in stages}) == {}


def test_a_stream_collapses_below_sixty_percent_of_its_reference():
    # A thousand facts are compared with the first hundred, earlier checkpoints with nothing.
    checkpoints = [10, 20, 50, 100, 200, 500, 1000]
    found = collapse_point(checkpoints, [1.0, 0.2, 0.9, 0.8, 0.49, 0.47, 0.1])
    assert found == {"at": 500, "reference_at": 100, "bound": pytest.approx(0.48)}
    assert collapse_point(checkpoints, [0.8] * 7)["at"] is None
    assert collapse_point(checkpoints, [None] * 7)["at"] is None
    assert collapse_point([1, 2, 5, 10], [1.0, 0.9, 0.9, 0.3])["at"] == 10
