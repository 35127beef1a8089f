"""GRACE: the codebook's rules, what it does to rows, and the value it trains."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from edit_kinds import answers
from support import FAMILIES, REQUESTS, TEXT, tiny_base

from kedit_lightning import Edit, EditRequest
from kedit_lightning.base_models.taps import capture
from kedit_lightning.edits import CodebookEdit
from kedit_lightning.edits.kinds.codebook.codebook import (
    SPLIT_GAP,
    CodebookEntry,
    build_codebook,
    replace_rows,
    write_entry,
)
from kedit_lightning.edits.kinds.codebook.codebook_edit import stacked_codebook
from kedit_lightning.edits.rounding import state_rounding
from kedit_lightning.errors import ModuleNotLocatedError, NonFiniteError, UnsupportedUseError
from kedit_lightning.methods import GRACE
from kedit_lightning.methods.memory.grace import default_place
from kedit_lightning.methods.shared.answer_passes import AnswerPasses
from kedit_lightning.methods.shared.published_settings import published_tables

REQUEST = REQUESTS[0]
OTHERS = [text.split(".")[0] for text in TEXT]


def entry(*place, label=(1,), radius=1.0, value=0.0):
    key = torch.tensor(place, dtype=torch.float64)
    return CodebookEntry(key, torch.full_like(key, value), label, radius)


def codebook(base, edit):
    part = edit.parts()[0]
    return stacked_codebook(base, part.family, torch.device("cpu"))


def same_codebook(one, other):
    return one.labels == other.labels and all(
        torch.equal(getattr(one, part), getattr(other, part))
        for part in ("keys", "values", "radii")
    )


# ---- the rules


def test_rules_new_expand_split_new():
    book, rules = None, []
    for item in (entry(0, 0), entry(0.6, 0), entry(1.5, 0, label=(2,)), entry(9, 0, label=(3,))):
        book, rule, _ = write_entry(book, item)
        rules.append(rule)
    assert rules == ["new", "expand", "split", "new"]
    assert book.keys.tolist() == [[0, 0], [1.5, 0], [9, 0]]
    assert book.radii.tolist() == pytest.approx([0.75 - SPLIT_GAP, 0.75, 1.0], abs=1e-12)
    assert book.radii[0] + book.radii[1] < (book.keys[0] - book.keys[1]).norm()


def test_expanding_never_shrinks_and_reaches_the_new_key():
    book, rule, index = write_entry(build_codebook([entry(0, 0)]), entry(1.8, 0, value=7.0))
    assert (rule, index) == ("expand", 0)
    assert book.radii.tolist() == [1.8]
    assert book.values[0].tolist() == [7, 7]
    again, rule, _ = write_entry(book, entry(0.5, 0))
    assert rule == "expand"
    assert again.radii.tolist() == [1.8]


def test_codebooks_that_grow_from_one_in_two_ways_are_those_written_anew():
    places = [entry(9 * number, number, label=(number,), value=number) for number in range(40)]
    below = build_codebook(places[:20])
    ways = [places[20:], [entry(1e3, 5, label=(99,), value=9.0)], [entry(0.5, 0, value=3.0)]]
    grown = [build_codebook(way, book=below) for way in (*ways, ways[1])]
    for book, way in zip(grown, (*ways, ways[1]), strict=True):
        assert same_codebook(book, build_codebook([*places[:20], *way]))
    assert same_codebook(below, build_codebook(places[:20]))
    assert grown[0].keys.data_ptr() != grown[1].keys.data_ptr()


def test_the_codebook_of_a_stack_is_added_to_and_not_written_anew(monkeypatch):
    base, written = tiny_base("llama"), []
    edits = [GRACE(base, steps=1, radius=1e-6).edit([request]) for request in REQUESTS]

    def counted(entries, rounding, book=None):
        written.append(len(entries))
        return build_codebook(entries, rounding, book)

    monkeypatch.setattr(
        "kedit_lightning.edits.kinds.codebook.codebook_edit.build_codebook", counted
    )
    with warnings.catch_warnings(), base.edits.restored():
        warnings.simplefilter("ignore")
        for edit in edits:
            edit.apply()
            answers(base)
        # The first is known since its probability was measured.
        assert written == [0, *[1] * (len(edits) - 1)]
        edits[-1].rollback()
        answers(base)
        edits[-1].apply()
        answers(base)
        assert written[len(edits) :] == [0, 0]
        edits[1].rollback()  # those above it are written again
        answers(base)
        assert written[-1] == len(edits) - 2
        others = [e.entries[0] for i, e in enumerate(edits) if i != 1]
        assert same_codebook(
            codebook(base, edits[0]), build_codebook(others, state_rounding(base.dtype))
        )


def test_the_border_belongs_to_the_ball():
    for distance, rule in ((2.0, "split"), (2.0 + 1e-9, "new")):
        _, applied, _ = write_entry(build_codebook([entry(0, 0)]), entry(distance, 0, label=(2,)))
        assert applied == rule
    queries = torch.tensor([[1.0, 0.0], [1 + 1e-9, 0.0]], dtype=torch.float64)
    assert build_codebook([entry(0, 0)]).lookup(queries).tolist() == [0, -1]


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-6])
def test_a_new_answer_to_the_same_key_takes_the_place_of_the_old_one(distance):
    book = build_codebook([entry(3, 4, value=1.0), entry(9, 9, label=(7,))], rounding=1e-6)
    changed, rule, index = write_entry(book, entry(3, 4 + distance, label=(2,), value=2.0))
    assert (rule, index, changed.labels) == ("replace", 0, ((2,), (7,)))
    assert changed.values[0].tolist() == [2, 2]
    assert changed.radii.tolist() == [1, 1]
    assert changed.lookup(changed.keys).tolist() == [0, 1]
    same, rule, _ = write_entry(changed, entry(3, 4, label=(2,), value=3.0))
    assert (rule, len(same.labels)) == ("expand", 2)


def test_an_answer_that_is_replaced_leaves_no_larger_ball():
    wide = build_codebook([entry(0, 0), entry(1.8, 0)])  # expanded to 1.8
    narrow = build_codebook([entry(0, 0), entry(0.4, 0, label=(3,))])  # split at 0.2
    for book, radius in ((wide, 1.0), (narrow, 0.2 - SPLIT_GAP)):
        changed, rule, index = write_entry(book, entry(0, 0, label=(2,)))
        assert (rule, index) == ("replace", 0)
        assert float(changed.radii[0]) == pytest.approx(radius, abs=1e-12)


@pytest.mark.parametrize("radius", [0.0, -1e-5])
def test_a_key_is_recognised_within_rounding_whatever_its_radius(radius):
    book = build_codebook([entry(3, 4, radius=radius)], rounding=1e-3)
    queries = torch.tensor([[3.0, 4.0], [3.0, 4.004], [3.0, 4.006]], dtype=torch.float64)
    assert book.lookup(queries).tolist() == [0, 0, -1]


def test_a_split_may_leave_another_pair_overlapping_and_lookup_still_gives_one():
    book = build_codebook([entry(0, 0), entry(2.1, 0, label=(2,)), entry(1.2, 0, label=(3,))])
    overlapping = [
        (i, j)
        for i in range(3)
        for j in range(i)
        if (book.keys[i] - book.keys[j]).norm() < book.radii[i] + book.radii[j] - 1e-9
    ]
    assert overlapping == [(2, 0)]
    between = torch.tensor([[0.55, 0.0], [0.65, 0.0], [2.2, 0.0], [5.0, 0.0]], dtype=torch.float64)
    assert book.lookup(between).tolist() == [0, -1, 1, -1]


def test_equal_answers_are_told_by_their_tokens_whatever_the_prompts_length():
    base = tiny_base("llama")
    grace = GRACE(base_model=base, radius=1e3, steps=1)
    prompts = ("The Eiffel Tower is in the city of", "Amber Falls lies in")
    same = grace.edit([EditRequest(prompt, "Rome") for prompt in prompts])
    assert [part.origin.notes["rule"] for part in same.parts()] == ["new", "expand"]
    # The same tokens in another order have the same mean, which the released code compares.
    lyon, berlin = "Lyon Berlin", "Berlin Lyon"
    other = grace.edit([EditRequest(prompts[0], lyon), EditRequest(prompts[1], berlin)])
    labels = [part.entries[0].label for part in other.parts()]
    assert sorted(labels[0]) == sorted(labels[1])
    assert [part.origin.notes["rule"] for part in other.parts()] == ["new", "split"]


# ---- what it does to rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_only_recognised_rows_change_and_the_others_not_by_a_bit(kind, side):
    base = tiny_base(kind, torch.float32)
    prompts = [*OTHERS, REQUEST.prompt]
    rows = base.rows(prompts, padding_side=side)
    before = base.forward(rows).logits
    edit = GRACE(base_model=base, radius=1e-3, steps=3).edit([REQUEST])
    with edit:
        after = base.forward(rows).logits
    assert torch.equal(after[:-1], before[:-1])
    end = rows.prompt_end[-1]
    assert not torch.allclose(after[-1, end], before[-1, end], atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_layer_returns_the_value_itself_for_the_prompt_it_was_given(kind, side):
    base = tiny_base(kind)
    grace = GRACE(base_model=base, radius=1e-6, steps=3)
    edit = grace.edit([REQUEST])
    rows = base.rows([OTHERS[0], REQUEST.prompt], padding_side=side)
    assert edit.origin.settings["module"] == grace.settings.module
    with edit, capture(base.model, [grace.settings.module]) as seen:
        base.forward(rows)
        (stored,) = edit.entries
        output = seen.outputs[grace.settings.module][1, rows.prompt_end[1]]
        key = seen.inputs[grace.settings.module][1, rows.prompt_end[1]]
    assert torch.equal(output, stored.value)
    torch.testing.assert_close(key, stored.key, rtol=0, atol=1e-12)


def test_padding_side_does_not_move_the_key():
    keys = []
    for side in ("left", "right"):
        base = tiny_base("gpt2")
        base.padding_side = side
        keys.append(GRACE(base_model=base, steps=1).edit([REQUEST]).entries[0].key)
    assert torch.equal(*keys)


def test_an_output_nobody_recognises_is_handed_through_untouched():
    output = torch.randn(2, 3, 4)
    nobody = torch.tensor([-1, -1])
    for where in ("last", "prompt", "all"):
        found = replace_rows(output, torch.zeros(1, 4), nobody, torch.tensor([1, 2]), where)
        assert found is output
    base = tiny_base("gpt2")
    with GRACE(base_model=base, steps=1).edit([REQUEST]):
        pass
    assert not base.module("transformer.h.2.mlp.c_proj")._forward_hooks


@pytest.mark.parametrize(
    ("where", "replaced"),
    [("last", [[1], [2]]), ("prompt", [[0, 1], [0, 1, 2]]), ("all", [[0, 1, 2, 3]] * 2)],
)
def test_which_tokens_get_the_value(where, replaced):
    output, value = torch.zeros(3, 4, 2), torch.ones(1, 2)
    ends = torch.tensor([1, 2, 3])
    found = replace_rows(output, value, torch.tensor([0, 0, -1]), ends, where)
    assert [row.nonzero()[:, 0].unique().tolist() for row in found] == [*replaced, []]


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("llama", "last"),
        ("gpt2", "all"),
        *[
            pytest.param(kind, where, marks=pytest.mark.slow)
            for kind in FAMILIES
            for where in ("last", "prompt", "all")
            if (kind, where) not in (("llama", "last"), ("gpt2", "all"))
        ],
    ],
)
def test_generation_with_a_cache_equals_generation_without(kind, where):
    base = tiny_base(kind)
    prompts = [OTHERS[0], REQUEST.prompt, OTHERS[1]]
    grace = GRACE(base_model=base, radius=1e-3, steps=20, replacement=where)
    plain = base.generate(prompts, max_new_tokens=5)
    with grace.edit([REQUEST]):
        cached = base.generate(prompts, max_new_tokens=5)
        assert cached == base.generate(prompts, max_new_tokens=5, use_cache=False)
        assert cached == [base.generate([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert cached[1] != plain[1]
    assert (cached[0], cached[2]) == (plain[0], plain[2])


# ---- the value


@pytest.mark.parametrize("where", ["last", "prompt", "all"])
def test_training_sees_what_the_applied_edit_does(where):
    base = tiny_base("gpt2")
    grace = GRACE(base_model=base, radius=1e-3, steps=60, replacement=where)
    edit = grace.edit([REQUEST])
    rows = base.rows([REQUEST.prompt], [REQUEST.target_new])
    passes = AnswerPasses.of(base, [REQUEST], [grace.settings.module])
    trained = float(grace.value_losses(passes, [edit.entries[0].value[None]]))
    before = -float(base.answer_log_probs(rows).sum() / rows.answer_mask.sum())
    with edit:
        after = -float(base.answer_log_probs(rows).sum() / rows.answer_mask.sum())
    assert after == pytest.approx(trained, abs=1e-12)
    assert after < before - 1


def test_gradient_of_the_value_is_that_of_the_output_it_replaces():
    base = tiny_base("gpt2")
    grace = GRACE(base_model=base)
    grace.configure_model()
    passes = AnswerPasses.of(base, REQUESTS, [grace.settings.module], "prompt_end")
    value = torch.rand(32, dtype=torch.float64, requires_grad=True)

    def loss_of(value):
        return grace.value_losses(passes, [value.expand(len(REQUESTS), -1)]).mean()

    (gradient,) = torch.autograd.grad(loss_of(value), value)
    for i in (0, 7, 31):
        step = torch.zeros_like(value)
        step[i] = 1e-5
        with torch.no_grad():
            slope = loss_of(value + step) - loss_of(value - step)
        assert float(slope / 2e-5) == pytest.approx(float(gradient[i]), abs=1e-8)


@pytest.mark.parametrize("kind", FAMILIES)
def test_value_is_that_of_a_plain_training_loop(kind):
    base = tiny_base(kind)
    settings = {"base_model": base, "lr": 0.3, "radius": 1e-3}
    grace = GRACE(**settings, steps=5)
    (found,) = grace.edit([REQUEST]).entries
    value = GRACE(**settings, steps=0).edit([REQUEST]).entries[0].value.requires_grad_()
    rows = base.rows([REQUEST.prompt], [REQUEST.target_new])
    end, answer = int(rows.prompt_end[0]), rows.answer_ids[0]

    def put(module, args, output):
        changed = output.clone()
        changed[0, end] = value
        return changed

    handle = base.module(grace.settings.module).register_forward_hook(put)
    optimizer = torch.optim.Adam([value], lr=0.3)
    for _ in range(5):
        logits = base.model(**rows.inputs).logits[0, end : end + len(answer)]
        optimizer.zero_grad()
        F.cross_entropy(logits, answer).backward()
        optimizer.step()
    handle.remove()
    torch.testing.assert_close(found.value, value.detach(), rtol=0, atol=1e-9)


def test_cold_values_start_from_the_seed_and_warm_ones_from_the_layer():
    base = tiny_base("llama")

    def start(**settings):
        return GRACE(base_model=base, steps=0, **settings).edit([REQUEST]).entries[0].value

    cold = start()
    assert torch.equal(cold, start())
    assert not torch.equal(cold, start(seed=1))
    assert 0 <= cold.min() < 0.2 < 0.8 < cold.max() < 1
    rows = base.rows([REQUEST.prompt], [REQUEST.target_new])
    before = base.answer_logits(rows)
    with GRACE(base_model=base, steps=0, value_init="warm").edit([REQUEST]):
        torch.testing.assert_close(base.answer_logits(rows), before, rtol=0, atol=1e-10)


def test_an_entry_that_is_widened_is_trained_on_from_where_it_stands():
    base = tiny_base("llama")
    first = GRACE(base_model=base, radius=1e3, steps=5).edit([REQUEST])
    near = EditRequest("Amber Falls lies in", REQUEST.target_new)
    with first:
        second = GRACE(base_model=base, radius=1e3, steps=0).edit([near])
        assert second.origin.notes["rule"] == "expand"
        assert torch.equal(second.entries[0].value, first.entries[0].value)
        trained = GRACE(base_model=base, radius=1e3, steps=5).edit([near])
        with trained:
            book = codebook(base, trained)
    assert len(book.labels) == 1
    assert torch.equal(book.values[0], trained.entries[0].value)
    assert not torch.equal(book.values[0], first.entries[0].value)


# ---- the stack


def test_rolling_back_gives_neighbours_their_radius_back():
    base = tiny_base("gpt2")
    grace = GRACE(base_model=base, radius=50.0, steps=1)
    first = grace.edit([REQUESTS[0]])
    with first:
        before = codebook(base, first)
        second = grace.edit([REQUESTS[1]])
        with second:
            split = codebook(base, second)
        after = codebook(base, first)
    assert second.origin.notes["rule"] == "split"
    assert split.radii[0] < before.radii[0] == 50
    assert second.origin.notes["radius"] == pytest.approx(float(split.radii[1]))
    assert same_codebook(before, after)


def test_any_edit_may_go_first():
    base = tiny_base("gpt2")
    grace = GRACE(base_model=base, radius=1e-3, steps=3)
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    plain = base.answer_logits(rows)
    whole = grace.edit(REQUESTS)
    with whole:
        together = base.answer_logits(rows)
        assert len(codebook(base, whole).labels) == len(REQUESTS)
    with base.edits.restored():
        # Each is applied before the next is computed.
        edits = [grace.edit([request]).apply() for request in REQUESTS]
        torch.testing.assert_close(base.answer_logits(rows), together, rtol=0, atol=1e-8)
        edits[0].rollback()
        without = base.answer_logits(rows)
    assert torch.equal(without[0], plain[0])
    torch.testing.assert_close(without[1:], together[1:], rtol=0, atol=1e-8)


@pytest.mark.parametrize("gone", range(len(REQUESTS)))
@pytest.mark.parametrize("radius", [1e-3, 50.0])
def test_the_others_answer_as_before_whichever_edit_goes(radius, gone):
    base = tiny_base("llama")
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    with base.edits.restored():
        grace = GRACE(base_model=base, radius=radius, steps=3)
        edits = [grace.edit([request]).apply() for request in REQUESTS]
        rules = {edit.origin.notes["rule"] for edit in edits}
        assert ("split" in rules) == (radius == 50)
        together = base.answer_logits(rows)
        edits[gone].rollback()
        without = base.answer_logits(rows)
    kept = [number for number in range(len(REQUESTS)) if number != gone]
    assert torch.equal(without[kept], together[kept])
    assert not torch.equal(without[gone], together[gone])


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_entries_that_merged_answer_as_before_whichever_of_them_goes(gone):
    base = tiny_base("gpt2")
    requests = [EditRequest(request.prompt, "Rome") for request in REQUESTS[:3]]
    rows = base.rows([r.prompt for r in requests], [r.target_new for r in requests])
    with base.edits.restored():
        grace = GRACE(base_model=base, radius=1e3, steps=30)
        edits = [grace.edit([request]).apply() for request in requests]
        assert [edit.origin.notes["rule"] for edit in edits] == ["new", "expand", "expand"]
        together = base.answer_logits(rows)
        edits[gone].rollback()
        without = base.answer_logits(rows)
        newest = 2 if gone < 2 else 1
        (book,) = [codebook(base, edits[newest])]
        assert len(book.labels) == 1
        assert torch.equal(book.values[0], edits[newest].entries[0].value)
    if gone < 2:  # the newest value answers for all of them, as before
        torch.testing.assert_close(without, together, rtol=0, atol=1e-12)


def test_a_loaded_codebook_routes_as_the_saved_one(tmp_path):
    base = tiny_base("llama")
    edit = GRACE(base_model=base, radius=50.0, steps=3).edit(REQUESTS)
    path = edit.save(tmp_path / "grace.safetensors")
    with edit:
        saved = codebook(base, edit)
    loaded = Edit.load(path, base)
    with loaded:
        read = codebook(base, loaded)
    assert same_codebook(saved, read)
    queries = torch.randn(64, saved.keys.shape[1], dtype=torch.float64) + saved.keys.mean(0)
    assert torch.equal(saved.lookup(queries), read.lookup(queries))


def test_codebooks_of_different_layers_are_told_apart():
    base = tiny_base("gpt2")
    rows = base.rows([REQUEST.prompt], [REQUEST.target_new])
    with GRACE(base_model=base, layer=1, radius=50.0, steps=1).edit([REQUEST]):
        middle = base.answer_logits(rows)
        edit = GRACE(base_model=base, layer=2, radius=50.0, steps=1).edit([REQUEST])
        assert edit.origin.notes["rule"] == "new"
        with edit:
            assert not torch.equal(base.answer_logits(rows), middle)


# ---- corrections

CORRECTED = ("Lyon", "Madrid", "Rome", "Lyon")


def given(base, edit, prompt=REQUEST.prompt):
    """What the layer returns at the end of a prompt, in a padded batch."""
    rows = base.rows([*OTHERS, prompt])
    with capture(base.model, [edit.module]) as seen:
        base.forward(rows)
    return seen.outputs[edit.module][-1, rows.prompt_end[-1]]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_last_answer_to_a_prompt_holds_and_the_one_before_comes_back(kind, dtype):
    base = tiny_base(kind, dtype)
    grace = GRACE(base_model=base, radius=0.0, steps=3)
    rows = base.rows([REQUEST.prompt, *OTHERS])
    states = [base.forward(rows).logits]
    edits = []
    with base.edits.restored():
        for target in CORRECTED:
            edits.append(grace.edit([EditRequest(REQUEST.prompt, target)]).apply())
            assert torch.equal(given(base, edits[-1]), edits[-1].entries[0].value.to(dtype))
            states.append(base.forward(rows).logits)
        assert [e.origin.notes["rule"] for e in edits] == ["new", *["replace"] * 3]
        assert len(codebook(base, edits[0]).labels) == 1
        edits[1].rollback()  # one that is not in force
        assert torch.equal(base.forward(rows).logits, states[4])
        for number, left in ((3, 3), (2, 1), (0, 0)):
            edits[number].rollback()
            assert torch.equal(base.forward(rows).logits, states[left])


def test_two_answers_in_one_edit_and_a_codebook_from_a_file(tmp_path):
    base = tiny_base("llama", torch.float32)
    requests = [EditRequest(REQUEST.prompt, target) for target in CORRECTED[:3]]
    requests.insert(1, REQUESTS[1])
    with pytest.warns(UserWarning, match="contradictory targets"):  # of which the last is written
        edit = GRACE(base_model=base, radius=0.1, steps=3).edit(requests)
    other, last = edit.parts()
    with edit:
        assert torch.equal(given(base, last), last.entries[0].value)
        assert torch.equal(given(base, last, REQUESTS[1].prompt), other.entries[0].value)
        saved = codebook(base, edit)
    loaded = Edit.load(edit.save(tmp_path / "edit.safetensors"), base)
    with loaded:
        assert same_codebook(codebook(base, loaded), saved)
        assert torch.equal(given(base, last), last.entries[0].value)


def test_a_correction_leaves_other_facts_alone():
    base = tiny_base("gpt2")
    grace = GRACE(base_model=base, radius=1.0, steps=5)
    facts = grace.edit(REQUESTS)
    rows = base.rows([r.prompt for r in REQUESTS])
    with facts:
        before = base.forward(rows).logits
        again = grace.edit([EditRequest(REQUEST.prompt, "Madrid")])
        with again:
            after = base.forward(rows).logits
    assert again.origin.notes["rule"] == "replace"
    assert torch.equal(after[1:], before[1:])
    assert not torch.equal(after[0], before[0])


# ---- places and bad input


def test_settings_follow_the_base_model(monkeypatch):
    base = tiny_base("gpt2")

    def target(**settings):
        grace = GRACE(base_model=base, **settings)
        grace.configure_model()
        return grace.settings.module

    assert target() == "transformer.h.2.mlp.c_proj"
    assert target(layer=-1) == "transformer.h.3.mlp.c_proj"
    assert target(module="transformer.h.1.mlp.c_fc") == "transformer.h.1.mlp.c_fc"
    place = {"layer": 3, "projection": 0}
    monkeypatch.setitem(published_tables()["GRACE"], ("gpt2", 4, 32), place)
    assert target() == "transformer.h.3.mlp.c_fc"


@pytest.mark.parametrize(("blocks", "layer"), [(32, 24), (6, 4), (2, 0)])
def test_the_default_layer_follows_the_number_of_blocks(blocks, layer):
    assert default_place(tiny_base("llama", num_hidden_layers=blocks)) == (layer, -1)


def test_a_wide_projection_may_be_replaced_too():
    base = tiny_base("gpt2")
    grace = GRACE(base_model=base, module="transformer.h.2.mlp.c_fc", radius=1e-3, steps=30)
    rows = base.rows([REQUEST.prompt], [REQUEST.target_new])
    before = float(base.answer_log_probs(rows).sum())
    edit = grace.edit([REQUEST])
    assert isinstance(edit, CodebookEdit)
    assert [tuple(t.shape) for t in (edit.entries[0].key, edit.entries[0].value)] == [(32,), (128,)]
    with edit:
        assert float(base.answer_log_probs(rows).sum()) > before + 1


def test_refuses_what_it_cannot_do():
    base = tiny_base("llama")
    with pytest.raises(ModuleNotLocatedError, match="layer 9 does not exist"):
        GRACE(base_model=base, layer=9).edit([REQUEST])
    with pytest.raises(UnsupportedUseError, match=r"no module 'model\.layers\.9\.mlp'"):
        GRACE(base_model=base, module="model.layers.9.mlp").edit([REQUEST])
    for wrong in ({"radius": -1.0}, {"steps": -1}):
        with pytest.raises(UnsupportedUseError, match=next(iter(wrong))):
            GRACE(base_model=base, **wrong).edit([REQUEST])
    with pytest.raises(UnsupportedUseError, match="layer and module"):
        GRACE(base_model=base, layer=1, module="model.layers.1.mlp.down_proj").edit([REQUEST])


def test_refuses_a_value_that_is_not_finite():
    base = tiny_base("gpt2", torch.float32)
    with pytest.raises(NonFiniteError, match=r"loss of layer 'transformer\.h\.2\.mlp\.c_proj'"):
        GRACE(base_model=base, lr=1e37, steps=5).edit([REQUEST])


# ---- values that are trained together


@pytest.mark.parametrize("where", ["last", "prompt"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_values_trained_together_are_those_trained_alone(kind, where):
    base = tiny_base(kind)
    grace = GRACE(base_model=base, radius=1e-3, steps=8, replacement=where)
    other = GRACE(base_model=base, layer=0, radius=1e-3, steps=2).edit([REQUESTS[3]])
    # With nothing, with this codebook, and with a codebook of another layer on the stack.
    for stack in ([], [grace.edit([REQUESTS[3]])], [other]):
        with base.edits.restored():
            for edit in stack:
                edit.apply()
            together = list(grace.edit_each([[request] for request in REQUESTS]))
            for request, edit in zip(REQUESTS, together, strict=True):
                alone = grace.edit([request])
                (one,), (same,) = edit.entries, alone.entries
                assert torch.equal(one.key, same.key)
                assert (one.label, one.radius) == (same.label, same.radius)
                torch.testing.assert_close(one.value, same.value, rtol=1e-7, atol=1e-8)
                assert edit.origin.notes["rule"] == alone.origin.notes["rule"]
                assert edit.origin.notes["loss"] == pytest.approx(alone.origin.notes["loss"])


@pytest.mark.parametrize("radius", [1e-3, 50.0])
@pytest.mark.parametrize("init", ["cold", "warm"])
def test_facts_of_one_edit_get_the_values_they_get_one_after_another(radius, init):
    base = tiny_base("llama")
    grace = GRACE(base_model=base, radius=radius, steps=6, value_init=init)
    same = EditRequest("Amber Falls lies in", REQUEST.target_new)  # it may widen an entry
    requests = [REQUEST, same, *REQUESTS[1:3]]
    edit = grace.edit(requests)
    with base.edits.restored():
        alone = [grace.edit([request]).apply() for request in requests]
    for one, other in zip(edit.parts(), alone, strict=True):
        assert one.origin.notes["rule"] == other.origin.notes["rule"]
        torch.testing.assert_close(
            one.entries[0].value, other.entries[0].value, rtol=1e-7, atol=1e-8
        )
    assert ("expand" in [part.origin.notes["rule"] for part in alone]) == (radius > 1)


def test_the_stack_is_as_it_was_after_values_were_trained():
    base = tiny_base("gpt2")
    grace = GRACE(base_model=base, radius=1e-3, steps=2)
    with grace.edit(REQUESTS[:2]) as edit:
        before = list(base.edits)
        grace.edit(REQUESTS[2:])
        assert list(base.edits) == before == [edit]
