"""Edits that are computed together equal those computed alone, whatever is computed with them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from method_examples import METHODS, make
from support import FAMILIES, REQUESTS, tiny_base

from kedit_lightning import EditRequest, EditTrainer
from kedit_lightning.base_models.memory_budget import memory_budget
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import Requests
from kedit_lightning.errors import KEditError, NonFiniteError, one_line
from kedit_lightning.methods import FTM
from kedit_lightning.methods.shared import row_memory
from kedit_lightning.methods.shared.inner_loop import InnerLoop, adam
from kedit_lightning.requests import EditExample

SINGLE = [[request] for request in REQUESTS]


class Targets:
    """Rows whose losses are squared distances from points. Shape ``[n, 3]``."""

    def __init__(self, points):
        self.points = points

    def select(self, index):
        return Targets(self.points[index])


def distances(rows, tensors):
    assert len(rows.points) == len(tensors[0]) == len(tensors[1])
    return ((tensors[0] - rows.points) ** 2).sum(1) + tensors[1][:, 0, 0] ** 2


def deltas(edit):
    (part,) = edit.parts()
    return {
        f"{name}.{kind}": tensor
        for name, pair in part.changes.items()
        for kind, tensor in zip(("weight", "bias"), pair, strict=True)
        if tensor is not None
    }


# ---- the loop


@pytest.mark.parametrize("stop_loss", [float("-inf"), 0.3])
@pytest.mark.parametrize(
    "optimizer",
    [
        adam(0.1, weight_decay=0.2),
        lambda tensors: torch.optim.SGD(tensors, lr=0.05, momentum=0.9),
        lambda tensors: torch.optim.Adam(tensors, lr=0.1, amsgrad=True),
    ],
)
def test_each_row_is_optimised_as_it_is_alone(optimizer, stop_loss):
    torch.manual_seed(0)
    points = torch.randn(5, 3, dtype=torch.float64) * torch.tensor([[0.1, 0.5, 1, 2, 4]]).T
    start = [torch.zeros(5, 3, dtype=torch.float64), torch.ones(5, 2, 2, dtype=torch.float64).mT]
    loop = InnerLoop(optimizer, 40, stop_loss)
    together = loop.run(Targets(points), start, distances)
    lengths = list(map(len, together.losses))
    assert (lengths == [40] * 5) == (stop_loss < 0)
    assert stop_loss < 0 or len(set(lengths)) > 1  # rows drop out one after another
    for i in range(5):
        alone = loop.run(Targets(points[i : i + 1]), [t[i : i + 1] for t in start], distances)
        assert together.losses[i] == pytest.approx(alone.losses[0], rel=1e-12)
        for found, expected in zip(together.tensors, alone.tensors, strict=True):
            torch.testing.assert_close(found[i], expected[0], rtol=1e-12, atol=1e-12)


def test_a_row_below_the_stop_loss_is_not_updated_any_more():
    points = torch.zeros(2, 3, dtype=torch.float64)
    start = [torch.tensor([[0.0] * 3, [9.0] * 3]).double(), torch.zeros(2, 1, 1).double()]
    found = InnerLoop(adam(0.1), 3, 1.0).run(Targets(points), start, distances)
    assert found.tensors[0][0].tolist() == [0.0] * 3
    assert found.tensors[0][1].tolist() != [9.0] * 3
    assert list(map(len, found.losses)) == [1, 3]
    assert start[0][1].tolist() == [9.0] * 3  # what it started from is left as it was


def test_rows_that_drop_out_leave_the_others_in_their_memory():
    points = torch.tensor([[0.1] * 3, [4.0] * 3, [0.5] * 3, [2.0] * 3])
    seen = []

    def losses(rows, tensors):
        seen.append((len(tensors[0]), tensors[0].data_ptr()))
        return distances(rows, tensors)

    start = [torch.zeros(4, 3), torch.ones(4, 2, 2)]
    InnerLoop(adam(0.1), 60, 0.1).run(Targets(points), start, losses)
    assert len({count for count, _ in seen}) > 2
    assert len({place for _, place in seen}) == 1


def test_a_constraint_holds_after_every_step():
    start = [torch.zeros(2, 3), torch.zeros(2, 1, 1)]
    largest = []

    def losses(rows, tensors):
        largest.append(float(tensors[0].detach().abs().max()))
        return distances(rows, tensors)

    loop = InnerLoop(adam(0.5), 9, constrain=lambda tensors: tensors[0].clamp_(-0.7, 0.7))
    loop.run(Targets(torch.full((2, 3), 5.0)), start, losses)
    assert max(largest) == pytest.approx(0.7)


def test_a_loss_that_is_not_finite_is_refused():
    start = [torch.zeros(2, 3), torch.zeros(2, 1, 1)]
    points = torch.tensor([[0.0] * 3, [float("nan")] * 3])
    with pytest.raises(NonFiniteError, match="loss of layer 'here'"):
        InnerLoop(adam(0.1), 3, where="here").run(Targets(points), start, distances)


# ---- methods


@pytest.mark.parametrize("kind", FAMILIES)
def test_edits_computed_together_are_those_computed_alone(kind):
    base = tiny_base(kind)
    method = FTM(base_model=base, layers=[1, 3], lr=2e-3, steps=12, stop_loss=5.0)
    together = list(method.edit_each(SINGLE))
    epochs = [edit.origin.notes["epochs"] for edit in together]
    for request, edit in zip(REQUESTS, together, strict=True):
        alone = method.edit([request])
        assert edit.origin.requests == (request,)
        notes, expected_notes = dict(edit.origin.notes), dict(alone.origin.notes)
        for name in ("loss", "target_probabilities"):
            assert notes.pop(name) == pytest.approx(expected_notes.pop(name), rel=1e-6, abs=1e-4)
        assert notes == expected_notes
        expected = deltas(alone)
        for name, delta in deltas(edit).items():
            torch.testing.assert_close(delta, expected[name], rtol=1e-7, atol=1e-9)
    assert len(set(epochs)) > 1  # some end before others


def test_examples_of_several_facts_stand_beside_those_of_one():
    base = tiny_base("llama")
    method = FTM(base_model=base, lr=1e-2, steps=3)
    groups = [REQUESTS[:1], REQUESTS[1:3], REQUESTS[3:]]
    found = list(method.edit_each(groups))
    assert [edit.origin.requests for edit in found] == [tuple(group) for group in groups]
    for edit, group in zip(found, groups, strict=True):
        expected = deltas(method.edit(group))
        for name, delta in deltas(edit).items():
            torch.testing.assert_close(delta, expected[name], rtol=1e-7, atol=1e-9)


def test_a_fact_that_a_later_one_of_its_example_overwrites_is_not_written():
    base = tiny_base("llama")
    other = EditRequest(REQUESTS[0].prompt, "Oslo")
    (edit, _) = FTM(base_model=base, lr=1e-2, steps=3).edit_each([[REQUESTS[0], other], SINGLE[1]])
    assert edit.origin.requests == (other,)


def test_parts_that_fit_into_memory_change_no_edit(monkeypatch):
    base = tiny_base("gpt2")
    method = FTM(base_model=base, lr=1e-2, steps=3)
    whole = list(method.edit_each(SINGLE))
    sizes, train = [], method.edits_together

    def counted(requests):
        sizes.append(len(requests))
        return train(requests)

    monkeypatch.setattr(method, "edits_together", counted)
    budget = 3 * memory_budget(base.device) // 10**4
    monkeypatch.setattr(row_memory, "memory_budget", lambda device: budget)
    parts = method.edit_each(SINGLE)
    assert sizes == [method.together(REQUESTS)]  # the others when they are asked for
    assert 1 < sizes[0] < len(REQUESTS)
    for one, other in zip(whole, parts, strict=True):
        for name, delta in deltas(one).items():
            torch.testing.assert_close(delta, deltas(other)[name], rtol=1e-7, atol=1e-9)
    assert sum(sizes) == len(REQUESTS)


def test_asking_for_one_edit_computes_its_part_alone():
    base = tiny_base("gpt2")
    method = FTM(base_model=base, lr=1e-2, steps=3)
    edits = method.edit_each(SINGLE)
    assert edits[2].origin.requests == (REQUESTS[2],)
    assert [edit.origin.requests for edit in edits[-2:]] == [(REQUESTS[2],), (REQUESTS[3],)]
    with pytest.raises(IndexError):
        edits[4]


# ---- methods whose edits take one pass


#: Answers of several tokens: UltraEdit does nothing with one.
LONG = [replace(request, target_new=f"{request.target_new} or Lyon") for request in REQUESTS]
#: Each fact leaves out its own record.
SHOWN = {
    "pool": [EditExample.from_request(request, request.prompt) for request in REQUESTS],
    "demonstrations": 2,
}


def numbers(edit):
    """What an edit adds: the deltas of weights, or the state of a memory."""
    tensors, values = edit.parts()[0].state()
    return tensors, {name: value for name, value in values.items() if name != "id"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["MEND", "KE", "InstructEdit", "UltraEdit", "SERAC", "IKE", "KN"])
@pytest.mark.filterwarnings("ignore:UltraEdit has seen")
def test_edits_of_one_pass_are_those_computed_alone(name, side):
    base = tiny_base("gpt2" if side == "left" else "llama")
    base.padding_side = side
    settings = {**dict(METHODS)[name], **(SHOWN if name == "IKE" else {})}
    method = make(name, settings, base)
    alone = [method.edit([request]) for request in LONG]
    groups = [[LONG[2]], LONG[:2], [LONG[3]], [LONG[1]]]
    sizes = []
    method.edits_together, train = (
        lambda requests: sizes.append(len(requests)) or train(requests),
        method.edits_together,
    )
    together = list(method.edit_each(groups))
    assert sizes.count(3) == 1
    for place, number in ((0, 2), (2, 3), (3, 1)):
        found, wanted = together[place], alone[number]
        assert found.origin.requests == wanted.origin.requests
        assert found.origin.notes == wanted.origin.notes
        tensors, values = numbers(found)
        expected, others = numbers(wanted)
        assert values == others
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            error = float((tensor - expected[key]).double().norm())
            assert error <= 1e-9 * float(expected[key].double().norm())
        assert not tensors or any(bool(tensor.any()) for tensor in tensors.values())
    first, second = numbers(together[0])[0], numbers(together[2])[0]
    assert not first or any(
        first[key].shape != second[key].shape or not first[key].equal(second[key]) for key in first
    )


# ---- facts that cannot be edited


#: A token that is NaN in the model, a prompt that is too long, and what a method needs.
FAULTS = {
    "not finite": {"prompt": "Marie Curie % was born in"},
    "too long": {"prompt": "Marie Curie was born in " * 40},
    "target_old": {"target_old": None},
    "subject": {"subject": None},
    "task": {"task": None},
}
FAULTY = [
    *[(name, "not finite") for name in ("FTL", "FTM", "GRACE", "KN", "MEND", "KE", "SERAC")],
    *[("UltraEdit", "not finite"), ("InstructEdit", "task"), ("KN", "target_old")],
    *[("ROME", "not finite"), ("MEMIT", "subject"), ("TPatcher", "too long")],
    *[(name, "too long") for name in ("IKE", "ICE", "PROMPT", "DINM", "FTM")],
]


@pytest.fixture
def with_fault():
    """Gives a method, and requests of which the second has a fault."""
    changed = []

    def made(name, fault):
        base = tiny_base("llama")
        method = make(name, dict(METHODS)[name], base)
        method.configure_model()
        if fault == "not finite":
            weight = base.model.get_input_embeddings().weight.detach()
            row = weight[base.tokenizer("%")["input_ids"][-1]]
            changed.append((row, row.clone()))
            row.fill_(torch.nan)
        faulty = replace(LONG[1], id="faulty", **FAULTS[fault])
        return method, [LONG[0], faulty, *LONG[2:]]

    yield made
    for row, before in changed:
        row.copy_(before)


@pytest.mark.parametrize(("name", "fault"), FAULTY)
@pytest.mark.filterwarnings("ignore:UltraEdit has seen")
def test_a_fact_that_cannot_be_edited_takes_no_other_with_it(name, fault, with_fault):
    method, requests = with_fault(name, fault)
    with pytest.raises(KEditError) as alone:
        method.noted_edit([requests[1]])
    edits = method.edit_each([[request] for request in requests])
    for number, request in enumerate(requests):
        if number == 1:
            with pytest.raises(type(alone.value), match=re.escape(str(alone.value))):
                edits[number]
            continue
        found, expected = numbers(edits[number]), numbers(method.noted_edit([request]))
        assert found[1] == expected[1]
        for key, tensor in found[0].items():
            torch.testing.assert_close(tensor, expected[0][key], rtol=1e-7, atol=1e-9)


def test_a_part_with_such_a_fact_is_halved_and_not_computed_one_by_one(with_fault, monkeypatch):
    method, requests = with_fault("FTM", "not finite")
    requests = [*requests[:2], *[replace(requests[2], id=f"{n}") for n in range(6)]]
    sizes, train = [], method.edits_together
    monkeypatch.setattr(
        method, "edits_together", lambda part: sizes.append(len(part)) or train(part)
    )
    edits = method.edit_each([[request] for request in requests])
    assert [edits[n].origin.requests for n in (0, 2, 7)] == [(requests[n],) for n in (0, 2, 7)]
    assert sizes == [8, 4, 2, 1, 2, 4]


def test_an_index_error_of_a_method_is_no_end_of_its_edits(monkeypatch):
    method, train = FTM(base_model=tiny_base("llama"), lr=1e-2, steps=2), FTM.edits_together

    def broken(requests):
        if REQUESTS[2] in requests:
            raise IndexError("no such column")
        return train(method, requests)

    monkeypatch.setattr(method, "edits_together", broken)
    with pytest.warns(UserWarning, match=r"4 edits could not be computed .*no such column"):
        edits = method.edit_each(SINGLE)
    found = []

    def read():
        for edit in edits:
            found.append(edit.origin.requests[0])  # noqa: PERF401 - it ends early

    with pytest.warns(UserWarning, match="2 edits"), pytest.raises(IndexError, match="no such"):
        read()
    assert found == REQUESTS[:2]
    assert edits[3].origin.requests == (REQUESTS[3],)


def test_a_run_keeps_what_was_edited_before_such_a_fact(with_fault, tmp_path):
    method, requests = with_fault("FTM", "not finite")
    rows = [
        {"id": str(n), "prompt": r.prompt, "target_new": r.target_new}
        for n, r in enumerate([requests[0], requests[2], requests[1], requests[3]])
    ]
    (tmp_path / "facts.json").write_text(json.dumps(rows))
    trainer = EditTrainer(protocol=Protocol(generate=False), accelerator="cpu")
    with pytest.raises(NonFiniteError, match="loss of layer") as caught:
        trainer.test(
            method, Requests(path=tmp_path / "facts.json"), verbose=False, output=tmp_path / "run"
        )
    assert "in edit '2'" in one_line(caught.value)
    lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["0", "1"]
