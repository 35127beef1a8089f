"""What is asked of a model, under each protocol, and that nothing but the edit changes it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FAMILIES, REQUESTS, tiny_base
from toys import Toy

from kedit_lightning import BaseModel, Edit, EditExample, EditRequest, Probe
from kedit_lightning.benchmark import Protocol, ProtocolRunner, Reader, RunContext
from kedit_lightning.benchmark.answer_cache import AnswersCache
from kedit_lightning.edits import LowRankEdit
from kedit_lightning.errors import NonFiniteError, UnsupportedUseError
from kedit_lightning.metrics import EditMetrics

SHORT = Protocol(max_new_tokens=6)
PROBES = [
    Probe("rewrite", "Amber Falls lies in", ("Norway", "Italy"), contrast="Berlin"),
    Probe("locality", "Rome is the capital of", ("Italy",), "neighborhood"),
    Probe("locality", "The company Bolt was founded in"),
    Probe("portability", "What country is Lyon in? It is in", ("France",), "one_hop"),
]
EXAMPLES = [
    EditExample.from_request(request, f"e{i}", PROBES[1:] if i % 2 else PROBES[1:2])
    for i, request in enumerate(REQUESTS)
]


def zero_edit(base: BaseModel) -> Edit:
    edit = Toy(base_model=base).edit(REQUESTS[:1])
    assert isinstance(edit, LowRankEdit)
    return LowRankEdit(base, {n: (a, torch.zeros_like(b)) for n, (a, b) in edit.factors.items()})


def run(base: BaseModel, protocol: Protocol, examples: list[EditExample] = EXAMPLES) -> list[Any]:
    runner = ProtocolRunner(base, Toy(base_model=base).edit, RunContext(protocol))
    size = protocol.read_together
    chunks = [examples[i : i + size] for i in range(0, len(examples), size)]
    records, runner.chunks = [], len(chunks)
    for index, chunk in enumerate(chunks):
        records += runner.chunk(chunk, index)
    return records + list(runner.finish())


def assert_same_readings(one: list[Any], other: list[Any]) -> None:
    def by_name(records: list[Any]) -> dict[Any, Any]:
        return {(r["id"], r["stage"]): r for r in records}

    left, right = by_name(one), by_name(other)
    assert left.keys() == right.keys()
    for key in left:
        for a, b in zip(left[key]["probes"], right[key]["probes"], strict=True):
            for state in ("base", "before", "after"):
                assert a[state].keys() == b[state].keys()
                for name, value in a[state].items():
                    expected = b[state][name]
                    if isinstance(value, float):
                        expected = pytest.approx(expected, abs=1e-6)
                    assert value == expected, (key, a["prompt"], state, name)


# ---- protocol


def test_protocol_takes_the_comma_form_and_a_list() -> None:
    assert Protocol(evaluate="final, immediate").moments == ("final", "immediate")
    assert Protocol(evaluate=["final"]).moments == ("final",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "sequentail"),
        ("chunk_size", 0),
        ("evaluate", "later"),
        ("evaluate", ""),
        ("scoring", "mine"),
        ("score_batch_size", -1),
        ("max_new_tokens", 0),
        ("every", 10),
        ("answers", "exact"),
    ],
)
def test_protocol_refuses_by_name(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedUseError, match=rf"protocol\.{field} .*--trainer.protocol"):
        Protocol(**{field: value})


def test_protocol_id_follows_what_scores_depend_on() -> None:
    base = Protocol()
    assert base.id == Protocol(score_batch_size=1, chunk_size=9).id
    for other in (
        Protocol(mode="batch"),
        Protocol(scoring="legacy_easyedit"),
        Protocol(generate=False),
        Protocol(max_new_tokens=5),
        Protocol(answers="squad"),
    ):
        assert other.id != base.id
    assert Protocol(generate=False).id == Protocol(generate=False, answers="squad").id
    sequential = Protocol(mode="sequential", chunk_size=2)
    assert sequential.id != replace(sequential, chunk_size=3).id
    assert sequential.id != replace(sequential, evaluate="final").id


# ---- reading


def test_readings_say_what_the_model_says() -> None:
    base = tiny_base("llama")
    rewrite, known, free, _ = Reader(base, SHORT).base_readings(PROBES)
    rows = base.rows(["Amber Falls lies in"] * 3, ["Norway", "Italy", "Berlin"])
    log_probs = base.answer_log_probs(rows)
    means = (log_probs.sum(1) / rows.answer_mask.sum(1)).tolist()
    assert rewrite["log_prob"] == pytest.approx(means[0], abs=1e-9)
    assert rewrite["contrast_log_prob"] == pytest.approx(means[2], abs=1e-9)
    assert rewrite["text"] == base.generate(["Amber Falls lies in"], 6, stop_at_sentence=True)[0]
    assert "top1" not in rewrite
    assert "kl" not in rewrite
    assert known["tf_all"] is not None
    assert free["tf_all"] is None
    rows = base.rows([PROBES[2].prompt])
    logits = base.logits_at(rows, rows.prompt_end[:, None])
    assert free["top1"][0] == int(logits.argmax(-1))
    assert free["kl"] == 0.0


def test_any_accepted_answer_counts_as_exact() -> None:
    base = tiny_base("gpt2")
    (path,) = Reader(base, SHORT).base_readings([Probe("locality", "Amber Falls lies in")])
    first = base.tokenizer.decode(path["top1"][:1])
    probe = Probe("rewrite", "Amber Falls lies in", ("Norway", first))
    (reading,) = Reader(base, replace(SHORT, generate=False)).base_readings([probe])
    if base.rows([probe.prompt], [first]).answer_ids.tolist() == [path["top1"][:1]]:
        assert reading["tf_all"] is True
    assert reading["tf_tok"] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_that_changes_nothing_has_no_divergence(dtype: torch.dtype) -> None:
    base = tiny_base("llama", dtype)
    reader = Reader(base, SHORT)
    before = reader.base_readings(PROBES)
    with zero_edit(base):
        after = reader.readings(PROBES, before)
    for probe, old, new in zip(PROBES, before, after, strict=True):
        assert old == new
        if probe.kind == "locality":
            assert new["kl"] == 0.0


def test_an_edit_that_changes_something_diverges() -> None:
    base = tiny_base("llama")
    reader = Reader(base, SHORT)
    before = reader.base_readings(PROBES)
    with Toy(base_model=base).edit(REQUESTS[:1]):
        after = reader.readings(PROBES, before)
    assert all(r["kl"] > 0 for r, p in zip(after, PROBES, strict=True) if p.kind == "locality")


@pytest.mark.parametrize("generate", [True, False])
def test_legacy_scoring_reads_the_answer_positions(generate: bool) -> None:
    base = tiny_base("llama")
    protocol = Protocol(scoring="legacy_easyedit", generate=generate)
    readings = Reader(base, protocol).base_readings(PROBES)
    count = len(base.encode("Rome is the capital of", "Italy").answer)
    assert len(readings[1]["top1"]) == count
    assert all(reading["text"] is None for reading in readings)


@pytest.mark.parametrize("kind", [*FAMILIES[:2], "t5"])
def test_readings_do_not_depend_on_order_batch_or_padding(kind: str) -> None:
    base = tiny_base(kind)
    can_edit = kind != "t5"
    expected: list[Any] = []
    for side in ("right", "left"):
        for size in (1, 3, 32):
            base.padding_side = side
            reader = Reader(base, replace(SHORT, score_batch_size=size), f"{side}{size}")
            order = PROBES if size != 3 else PROBES[::-1]
            before = reader.base_readings(order)
            after = before
            if can_edit:
                with Toy(base_model=base).edit(REQUESTS[:1]):
                    after = reader.readings(order, before)
            found = list(zip(before, after, strict=True))
            found = found if size != 3 else found[::-1]
            if not expected:
                expected = found
            for pair, wanted in zip(found, expected, strict=True):
                for own, other in zip(pair, wanted, strict=True):
                    approximate = {
                        k: pytest.approx(v, abs=1e-6) if isinstance(v, float) else v
                        for k, v in other.items()
                    }
                    assert own == approximate


def test_long_answers_are_cut_to_the_room_there_is() -> None:
    base = tiny_base("llama", max_position_embeddings=24)
    (reading,) = Reader(base, Protocol()).base_readings([Probe("locality", "Amber Falls lies in")])
    assert 0 < len(reading["top1"]) < 24


# ---- base-model answers


def test_base_answers_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    first = Reader(base, SHORT).base_readings(PROBES)
    monkeypatch.setattr(Reader, "_read", lambda *_: pytest.fail("computed again"))
    assert Reader(base, SHORT).base_readings(PROBES[::-1]) == first[::-1]
    with pytest.raises(pytest.fail.Exception):
        Reader(base, replace(SHORT, max_new_tokens=7)).base_readings(PROBES)
    with pytest.raises(pytest.fail.Exception):
        Reader(tiny_base("gpt2"), SHORT).base_readings(PROBES)


def test_base_answers_are_those_of_the_unedited_model() -> None:
    base = tiny_base("llama")
    with Toy(base_model=base).edit(REQUESTS[:1]):
        under_edit = Reader(base, SHORT).base_readings(PROBES)
    assert under_edit == Reader(base, SHORT, "other file").base_readings(PROBES)


@pytest.mark.filterwarnings("ignore:the model of .* carries 1 edit")
def test_base_answers_of_a_copied_or_shared_edited_model_are_the_clean_ones() -> None:
    base = tiny_base("llama")
    with Toy(base_model=base).edit(REQUESTS[:1]):
        others = [
            BaseModel(copy.deepcopy(base.model), base.tokenizer),
            BaseModel(base.model, base.tokenizer),
        ]
        read = [Reader(o, SHORT, str(i)).base_readings(PROBES) for i, o in enumerate(others)]
    others[0].edits.clear()
    clean = Reader(base, SHORT, "clean").base_readings(PROBES)
    assert read == [clean, clean]


def test_base_answers_of_other_weights_are_not_read() -> None:
    base = tiny_base("llama")
    first = Reader(base, SHORT).cache.path
    weight = base.model.model.layers[1].mlp.down_proj.weight
    kept = weight.clone()
    with torch.no_grad():
        weight[3, 5] += 1  # which a sample of the weights misses
    assert Reader(base, SHORT).cache.path != first
    with torch.no_grad():
        weight.copy_(kept)
    assert Reader(base, SHORT).cache.path == first


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_base_answers_under_hooks_of_others_are_not_kept(how: str) -> None:
    base = tiny_base("llama")
    before = Reader(base, SHORT).base_readings(PROBES)
    block = base.model.model.layers[1].mlp

    def negated(x: torch.Tensor) -> torch.Tensor:
        return -type(block).forward(block, x)

    handle = block.register_forward_hook(lambda module, args, output: -output)
    if how == "forward":
        handle.remove()
        block.forward = negated
    with pytest.warns(
        UserWarning, match=r"hooks that kedit-lightning has not made.*layers\.1\.mlp"
    ):
        reader = Reader(base, SHORT)
    under = reader.base_readings(PROBES)
    assert under != before
    assert reader.base_readings(PROBES) == under
    handle.remove()
    vars(block).pop("forward", None)
    assert Reader(base, SHORT).base_readings(PROBES) == before


def test_a_line_that_a_crash_cut_off_is_passed_over(tmp_path: Path) -> None:
    cache = AnswersCache({"model": "m"}, tmp_path)
    cache.add({"a": {"tf_tok": 1.0}})
    with cache.path.open("a") as file:
        file.write('{"b": {"tf_')
    again = AnswersCache({"model": "m"}, tmp_path)
    assert "b" not in again.known
    again.add({"c": {"tf_tok": 0.5}})
    third = AnswersCache({"model": "m"}, tmp_path)
    assert third.known == {"a": {"tf_tok": 1.0}, "c": {"tf_tok": 0.5}}
    assert AnswersCache({"model": "n"}, tmp_path).known == {}


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = AnswersCache({"model": "m"}, tmp_path / "file" / "answers")
    with pytest.warns(UserWarning, match="point KEDIT_CACHE at a folder"):
        cache.add({"a": {"tf_tok": 1.0}})
    cache.add({"b": {"tf_tok": 0.0}})  # said once
    assert set(cache.known) == {"a", "b"}


# ---- modes


def test_single_rolls_back_after_each_example() -> None:
    base = tiny_base("llama")
    records = run(base, replace(SHORT, chunk_size=3))
    assert [(r["id"], r["stage"]) for r in records] == [(f"e{i}", "immediate") for i in range(4)]
    for record in records:
        assert all(p["base"] == p["before"] for p in record["probes"])
        after = record["probes"][0]["after"]
        assert after["log_prob"] > record["probes"][0]["before"]["log_prob"]
        assert record["edit"]["bytes"] > 0
        assert record["timing"].keys() == {"edit_seconds", "eval_seconds"}
        assert record["memory"]["peak_bytes"] > 0
        assert record["subject"] == EXAMPLES[int(record["id"][1])].requests[0].subject
    json.dumps(records)  # plain data


@pytest.mark.parametrize("kind", FAMILIES[:2])
def test_single_does_not_depend_on_chunks_batches_or_order(kind: str) -> None:
    base = tiny_base(kind)
    expected = run(base, replace(SHORT, chunk_size=1, score_batch_size=1))
    for chunk_size, size, side in ((8, 8, "left"), (2, 8, "right")):
        base.padding_side = side  # type: ignore[assignment]
        found = run(
            base, replace(SHORT, chunk_size=chunk_size, score_batch_size=size), EXAMPLES[::-1]
        )
        assert_same_readings(expected, found)


def test_batch_edits_a_chunk_at_once() -> None:
    base = tiny_base("llama")
    Toy.computed.clear()
    records = run(base, replace(SHORT, mode="batch", chunk_size=2))
    assert [len(prompts) for prompts in Toy.computed] == [2, 2]
    assert {r["stage"] for r in records} == {"immediate"}
    assert records[0]["edit_id"] == records[1]["edit_id"] != records[2]["edit_id"]
    toy = Toy(base_model=base)
    with toy.edit(REQUESTS[:2]) as edit:
        rows = base.rows([REQUESTS[1].prompt], [REQUESTS[1].target_new])
        log_prob = float(base.answer_log_probs(rows).sum() / rows.answer_mask.sum())
    assert records[1]["probes"][0]["after"]["log_prob"] == pytest.approx(log_prob, abs=1e-9)
    assert records[0]["edit"]["bytes"] * 2 == edit.nbytes


def test_sequential_keeps_edits_and_scores_again_at_the_end() -> None:
    base = tiny_base("llama")
    records = run(base, replace(SHORT, mode="sequential", chunk_size=1, every=2))
    stages = [(r["id"], r["stage"]) for r in records]
    assert stages == [
        *[("e0", "immediate"), ("e1", "immediate"), ("e0", "after_2"), ("e1", "after_2")],
        *[("e2", "immediate"), ("e3", "immediate")],
        *[(f"e{i}", "final") for i in range(4)],
    ]
    by_name = dict(zip(stages, records, strict=True))
    last, first = by_name["e3", "immediate"]["probes"][0], by_name["e0", "immediate"]["probes"][0]
    assert first["base"] == first["before"]
    assert last["base"] != last["before"]
    # Nothing was edited after the last example, so its final reading is its immediate one.
    assert by_name["e3", "final"]["probes"][0]["after"] == pytest.approx(last["after"])
    assert by_name["e0", "final"]["probes"][0]["after"] != first["after"]
    assert "final/rewrite/tf_tok" in EditMetrics.from_records(records).compute()


@pytest.mark.parametrize(
    ("evaluate", "stages"), [("immediate", {"immediate"}), ("final", {"final"})]
)
def test_sequential_scores_when_it_is_asked_to(evaluate: str, stages: set[str]) -> None:
    records = run(
        tiny_base("llama"), replace(SHORT, mode="sequential", chunk_size=3, evaluate=evaluate)
    )
    assert {r["stage"] for r in records} == stages
    assert len(records) == 4


def test_before_is_read_under_edits_that_were_there_already() -> None:
    base = tiny_base("llama")
    with Toy(base_model=base).edit(REQUESTS[3:]) as edit:
        (record, *_) = run(base, SHORT)
        assert list(base.edits) == [edit]
    probe = record["probes"][0]
    assert probe["base"] != probe["before"] != probe["after"]


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_an_exception_leaves_the_stack_as_it_was(mode: Any) -> None:
    base = tiny_base("llama")
    toy = Toy(base_model=base, fail_on="Lyon")
    with Toy(base_model=base).edit(REQUESTS[3:]) as edit:
        runner = ProtocolRunner(base, toy.edit, RunContext(replace(SHORT, mode=mode, chunk_size=2)))
        done = [record["id"] for record in runner.chunk(EXAMPLES[:2], 0)]
        with pytest.raises(NonFiniteError, match="lyon"):
            list(runner.chunk(EXAMPLES[2:], 1))
        runner.close()
        assert list(base.edits) == [edit]
    assert done == ["e0", "e1"]


def test_random_numbers_of_an_edit_depend_on_nothing_that_ran_before() -> None:
    base = tiny_base("llama")
    protocol = replace(SHORT, generate=False)
    runner = ProtocolRunner(base, Toy(base_model=base, noise=0.1).edit, RunContext(protocol))
    ids = {r["id"]: r["edit_id"] for r in runner.chunk(EXAMPLES, 0)}
    torch.rand(7)
    state = torch.random.get_rng_state()
    runner = ProtocolRunner(base, Toy(base_model=base, noise=0.1).edit, RunContext(protocol))
    (record,) = runner.chunk(EXAMPLES[2:3], 0)
    assert record["edit_id"] == ids["e2"]
    assert torch.equal(state, torch.random.get_rng_state())
    other = ProtocolRunner(base, Toy(base_model=base, noise=0.1).edit, RunContext(protocol, seed=1))
    assert [r["edit_id"] for r in other.chunk(EXAMPLES[2:3], 0)] != [ids["e2"]]


def test_several_requests_of_an_example_are_written_together() -> None:
    base = tiny_base("llama")
    example = EditExample(tuple(REQUESTS[:2]), (PROBES[0],), "pair")
    Toy.computed.clear()
    (record,) = run(base, SHORT, [example])
    assert [len(prompts) for prompts in Toy.computed] == [2]
    assert record["subject"] == "Eiffel Tower"


def test_prompts_of_context_edits_are_compared_at_the_same_positions() -> None:
    from kedit_lightning.edits import PromptEdit, PromptEntry

    base = tiny_base("llama")
    reader = Reader(base, SHORT)
    before = reader.base_readings(PROBES)
    with PromptEdit(base, [PromptEntry("Amber Falls lies in", "New Fact: Amber Falls is Norway.")]):
        after = reader.readings(PROBES, before)
    assert len(after[1]["top1"]) == len(before[1]["top1"])
    assert after[1]["kl"] > 0
    assert EditRequest("a b", "c").label
