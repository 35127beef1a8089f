"""Single edits scored together: each row carries its own edit, and no score depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import edit_kinds
import pytest
import torch
from edit_kinds import KINDS, random
from support import REQUESTS, tiny_base
from toys import Toy

from kedit_lightning import BaseModel, Edit, EditExample, EditRequest, Probe, methods
from kedit_lightning.benchmark import Protocol, ProtocolRunner, Reader, RunContext, runner
from kedit_lightning.edits import CodebookEdit, CompositeEdit, DenseEdit, LowRankEdit
from kedit_lightning.edits.low_rank import LowRankBatch, LowRankDelta
from kedit_lightning.errors import NonFiniteError

SHORT = Protocol(max_new_tokens=6)
ONE_BY_ONE = replace(SHORT, chunk_size=1, score_batch_size=1)
#: Asked of every example, so that equal rows carry different edits; and prompts of other lengths.
SHARED = [
    Probe("locality", "Rome is the capital of", ("Italy",), "neighborhood"),
    Probe("locality", "The company Bolt was founded in"),
    Probe("locality", REQUESTS[0].prompt, ("Paris",), "other_relation"),
]
PORTABLE = Probe("portability", "What country is Lyon in? It is in", ("France",), contrast="Rome")
EXAMPLES = [
    EditExample.from_request(request, f"e{i}", SHARED[: 3 - i % 2] + [PORTABLE] * (i % 2))
    for i, request in enumerate(REQUESTS)
]
#: Settings that make methods quick, not good.
METHODS: dict[str, dict[str, Any]] = {
    "FTM": {"lr": 1e-2, "steps": 3},
    "GRACE": {"radius": 1e-2, "steps": 3},
    "MEND": {"checkpoint": "none", "edit_lr": 1e-2},
    "ROME": {"statistics": "identity", "contexts": 2, "steps": 4},
}
EditFunction = Callable[[Sequence[EditRequest]], Edit]


def run(
    base: BaseModel,
    edit: EditFunction,
    protocol: Protocol,
    examples: Sequence[EditExample] = EXAMPLES,
    **settings: Any,
) -> dict[str, Any]:
    """Records by example, less what they cost."""
    runs = ProtocolRunner(base, edit, RunContext(protocol), **settings)
    size = protocol.chunk_size
    records = {}
    for start in range(0, len(examples), size):
        for record in runs.chunk(examples[start : start + size], start // size):
            records[record["id"]] = record
    list(runs.finish())
    for record in records.values():
        del record["timing"], record["memory"]
    return records


def assert_equal(found: Any, wanted: Any) -> None:
    """Equal texts and arg-max ids, and numbers to rounding."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_equal(found[key], value)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=0, abs=1e-9)
    else:
        assert found == wanted


def carried_rows(monkeypatch: pytest.MonkeyPatch, base: BaseModel) -> list[list[Edit | None]]:
    """The edits of each pass in which rows carry their own, filled as they are carried."""
    passes: list[list[Edit | None]] = []
    original = base.edits.carried

    def carried(edits: Sequence[Edit | None]) -> Any:
        passes.append(list(edits))
        return original(edits)

    monkeypatch.setattr(base.edits, "carried", carried)
    return passes


# ---- no score depends on it


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])  # opt flattens the rows of its MLPs
@pytest.mark.parametrize("name", METHODS)
def test_scores_equal_those_of_one_edit_at_a_time(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(family)
    made: dict[str, Edit] = {}
    method = getattr(methods, name)(base_model=base, **METHODS[name])

    def edit(requests: Sequence[EditRequest]) -> Edit:
        return made.setdefault(requests[0].prompt, method.edit(requests))

    wanted = run(base, edit, ONE_BY_ONE)
    changed = [p for r in wanted.values() for p in r["probes"] if p["after"] != p["before"]]
    assert changed
    passes = carried_rows(monkeypatch, base)
    for size, side, order in ((32, "right", 1), (3, "left", -1)):
        base.padding_side = side  # type: ignore[assignment]
        protocol = replace(SHORT, chunk_size=4, score_batch_size=size)
        assert_equal(run(base, edit, protocol, EXAMPLES[::order]), wanted)
    assert any(len(set(edits)) == 4 for edits in passes)


def test_kinds_of_edits_mix_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    kinds = ["low_rank", "dense", "prompt", "codebook", "bonus", "composite", "adapter", "codebook"]
    edits = {f"e{i}": KINDS[kind](base) for i, kind in enumerate(kinds)}
    examples = [replace(EXAMPLES[i % 4], id=f"e{i}") for i in range(len(kinds))]
    queue: list[Edit] = []

    def edit(requests: Sequence[EditRequest]) -> Edit:
        return queue.pop(0)

    below = [edit_kinds.low_rank(base, seed=90), edit_kinds.codebook(base, REQUESTS[1].prompt)]
    for other in below:
        other.apply()
    queue[:] = edits.values()
    wanted = run(base, edit, ONE_BY_ONE, examples)
    passes = carried_rows(monkeypatch, base)
    queue[:] = edits.values()
    assert_equal(run(base, edit, replace(SHORT, chunk_size=8), examples), wanted)
    # Edits of prompts and of decoding are applied by themselves, and cut the chunk.
    together = {frozenset(kinds[[*edits.values()].index(e)] for e in own if e) for own in passes}
    assert frozenset({"low_rank", "dense"}) in together
    assert frozenset({"adapter", "codebook"}) in together
    assert not {"prompt", "bonus", "composite"} & frozenset().union(*together)
    assert list(base.edits) == below
    base.edits.clear()


def test_equal_rows_under_different_edits_are_read_apart() -> None:
    base = tiny_base("llama")
    toy = Toy(base_model=base)
    edits = [toy.edit([request]) for request in REQUESTS[:2]]
    reader = Reader(base, SHORT)
    probes = [SHARED[0]] * 4
    before = reader.base_readings(probes)
    found = reader.readings(probes, before, [edits[0], None, edits[1], edits[0]])
    assert_equal(found[1], before[1])
    assert found[0] == found[3]
    assert len({reading["kl"] for reading in found}) == 3
    for edit, reading in zip(edits, (found[0], found[2]), strict=True):
        with edit:
            assert_equal([reading], reader.readings(probes[:1], before[:1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_whose_edit_changes_nothing_does_not_diverge(dtype: torch.dtype) -> None:
    base = tiny_base("llama", dtype)
    nothing = edit_kinds.low_rank(base)
    zero = LowRankEdit(base, {n: (a, 0 * b) for n, (a, b) in nothing.factors.items()})
    reader = Reader(base, SHORT)
    before = reader.base_readings(SHARED)
    after = reader.readings(SHARED, before, [zero, None, nothing])
    assert [reading["kl"] for reading in after[:2]] == [0.0, 0.0]
    assert after[2]["kl"] > 0


def test_edits_that_depend_on_their_stack_are_carried_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_base("llama")
    monkeypatch.setattr(LowRankEdit, "requires_its_stack", True)
    passes = carried_rows(monkeypatch, base)
    toy = Toy(base_model=base)
    with toy.edit(REQUESTS[3:]):
        wanted = run(base, toy.edit, ONE_BY_ONE)
        assert_equal(run(base, toy.edit, replace(SHORT, chunk_size=4)), wanted)
    assert passes


def test_a_memory_that_a_row_carries_acts_together_with_the_memories_below_it() -> None:
    base = tiny_base("llama")
    prompts = edit_kinds.PROMPTS
    # The first row is known to the codebook below; the second to both, and they share its ball.
    below = edit_kinds.codebook(base, prompts[0]), edit_kinds.codebook(base, prompts[1], seed=41)
    edits = [
        edit_kinds.codebook(base, prompts[2], seed=42),
        edit_kinds.codebook(base, prompts[1], seed=43, radius=1.0),
        edit_kinds.codebook(base, prompts[2], seed=44),
        None,
    ]
    for edit in below:
        edit.apply()
    wanted = edit_kinds.answers(base)
    for row, own in enumerate(edits):
        if own is not None:
            with own:
                wanted[row] = edit_kinds.answers(base)[row]
    with base.edits.carried(edits):
        torch.testing.assert_close(edit_kinds.answers(base), wanted, rtol=0, atol=1e-9)
    base.edits.clear()


# ---- low-rank edits in one product


def test_factors_of_unequal_rank_act_each_on_its_rows() -> None:
    deltas = [
        LowRankDelta(random(rank, 6, like=torch.float64), random(5, rank, like=torch.float64))
        for rank in (1, 2)
    ]
    groups = [([4, 0], deltas[0]), ([2], deltas[1])]
    x = random(6, 7, 6, like=torch.float64, seed=9)  # two copies of each of three rows
    found = LowRankBatch.of(groups).change(x)
    for rows, delta in ((slice(0, 4), deltas[0]), (slice(4, 6), deltas[1])):
        wanted = x[rows] @ delta.dense.T
        torch.testing.assert_close(found[rows], wanted, rtol=0, atol=1e-12)


# ---- making them


def test_no_more_edits_are_held_than_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    toy = Toy(base_model=base)
    happened: list[str] = []

    def edit(requests: Sequence[EditRequest]) -> Edit:
        happened.append("edit")
        return toy.edit(requests)

    original = Reader.readings

    def readings(self: Reader, probes: Any, base_readings: Any, *carried: Any, **asked: Any) -> Any:
        if base_readings is not None:  # those of the base model come first
            happened.append("read")
        return original(self, probes, base_readings, *carried, **asked)

    monkeypatch.setattr(Reader, "readings", readings)
    monkeypatch.setattr(runner, "CARRIED_BYTES", 2 * toy.edit(REQUESTS[:1]).nbytes)
    run(base, edit, replace(SHORT, chunk_size=4, generate=False))
    assert happened == ["read", *["edit", "edit", "read"] * 2]  # the first one is before the edits


def test_what_was_made_before_an_edit_failed_is_scored() -> None:
    base = tiny_base("llama")
    toy = Toy(base_model=base, fail_on="Lyon")
    done: list[str] = []
    runs = ProtocolRunner(base, toy.edit, RunContext(replace(SHORT, chunk_size=4)))

    def go() -> None:
        done.extend(record["id"] for record in runs.chunk(EXAMPLES, 0))

    with pytest.raises(NonFiniteError, match="lyon"):
        go()
    assert done == ["e0", "e1"]


def test_edits_of_a_chunk_are_asked_for_together() -> None:
    base = tiny_base("llama")
    toy = Toy(base_model=base)
    asked: list[list[str]] = []
    handed_on: list[str] = []

    def edit_each(groups: Sequence[Sequence[EditRequest]]) -> Iterable[Edit]:
        asked.append([requests[0].prompt for requests in groups])
        return [toy.edit(requests) for requests in groups]

    class Saved:
        resumed = True

        def record(self, id: str, stage: str) -> None:
            return None

        def has_edit(self, name: str) -> bool:
            return name == "e1"

        def edit(self, name: str, base: BaseModel, requests: Sequence[EditRequest]) -> Edit | None:
            assert list(requests) == REQUESTS[1:2]
            return toy.edit(REQUESTS[1:2]) if name == "e1" else None

    runs = ProtocolRunner(
        base,
        lambda requests: pytest.fail("asked for by itself"),
        RunContext(
            replace(SHORT, chunk_size=4, generate=False),
            output=Saved(),
            on_edit=lambda name, edit: handed_on.append(name),
        ),
        edit_each=edit_each,
    )
    records = list(runs.chunk(EXAMPLES, 0))
    # All of them, though one is saved: what is computed together rounds together.
    assert asked == [[request.prompt for request in REQUESTS]]
    assert handed_on == ["e0", "e2", "e3"]
    seconds = [record["timing"]["edit_seconds"] for record in records]
    assert seconds[1] is None
    assert max(seconds[0], seconds[2], seconds[3]) < 2 * min(seconds[0], seconds[2], seconds[3])
    assert len({record["timing"]["eval_seconds"] for record in records}) == 1
    ids = [toy.edit([request]).id for request in REQUESTS]
    assert [record["edit_id"] for record in records] == ids


def test_random_numbers_of_an_edit_do_not_depend_on_its_chunk() -> None:
    base = tiny_base("llama")
    toy = Toy(base_model=base, noise=0.1)
    protocol = replace(SHORT, generate=False)
    ids = []
    for size in (1, 3):
        found = run(base, toy.edit, replace(protocol, chunk_size=size), edit_each=toy.edit_each)
        ids.append({name: record["edit_id"] for name, record in found.items()})
    assert ids[0] == ids[1]
    assert len(set(ids[0].values())) == len(EXAMPLES)


def test_edit_each_gives_what_edit_gives_and_applies_nothing() -> None:
    base = tiny_base("llama")
    toy = Toy(base_model=base)
    edits = list(toy.edit_each([[request] for request in REQUESTS]))
    assert [edit.id for edit in edits] == [toy.edit([request]).id for request in REQUESTS]
    assert len(base.edits) == 0


def test_a_kind_says_whether_rows_can_carry_it() -> None:
    base = tiny_base("llama")
    able = {name for name, make in KINDS.items() if make(base).can_be_carried}
    weights = {"low_rank", "remembering", "dense", "adapter"}
    assert able == {*weights, "codebook", "neurons", "blocks", "side", "overlap", "deferral"}
    nested = CompositeEdit(base, [CompositeEdit(base, [KINDS["prompt"](base)])])
    assert not nested.can_be_carried
    assert CompositeEdit(base, [KINDS["dense"](base)]).can_be_carried
    assert CodebookEdit.rows_apart
    assert DenseEdit.rows_apart
