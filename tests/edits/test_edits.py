"""Edits of every kind: apply, roll back to the last bit, order, refusals."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace

import edit_kinds
import pytest
import torch
from edit_kinds import ANSWERS, KINDS, PROMPTS, WEIGHT_KINDS, answers, raw_logits
from support import FAMILIES, tiny_base

from kedit_lightning.base_models.taps import capture
from kedit_lightning.edits import (
    AdapterEdit,
    CodebookEdit,
    CompositeEdit,
    DenseEdit,
    LowRankEdit,
    PromptEdit,
    PromptEntry,
    memories,
)
from kedit_lightning.edits.kinds.codebook.codebook import CodebookEntry
from kedit_lightning.edits.projections import projection_shape
from kedit_lightning.errors import (
    EditFileError,
    EditOrderError,
    NonFiniteError,
    UnsupportedUseError,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


# ---- apply and roll back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rolls_back_to_the_last_bit(family, kind, dtype):
    base = tiny_base(family, dtype)
    before, raw = answers(base), raw_logits(base.model)
    edit = KINDS[kind](base)
    assert torch.equal(answers(base), before), "computing an edit changed the model"
    with edit as entered:
        assert entered is edit
        assert edit.applied
        assert list(base.edits) == [edit]
        assert not torch.equal(answers(base), before), "the edit did nothing"
    assert not edit.applied
    assert torch.equal(answers(base), before)
    assert torch.equal(raw_logits(base.model), raw)


@pytest.mark.parametrize("kind", KINDS)
def test_applying_and_rolling_back_twice_is_once(kind):
    base = tiny_base("llama")
    before = answers(base)
    edit = KINDS[kind](base)
    assert edit.apply() is edit
    once = answers(base)
    edit.apply()
    assert len(base.edits) == 1
    assert torch.equal(answers(base), once)
    edit.rollback()
    edit.rollback()
    assert torch.equal(answers(base), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
def test_a_block_leaves_an_edit_that_was_applied_before_it(kind, fails):
    base = tiny_base("llama")
    before, edit, other = answers(base), KINDS[kind](base), edit_kinds.low_rank(base)
    with edit:
        inside = answers(base)
        for _ in range(2):
            with suppress(RuntimeError), edit, other, edit:
                if fails:
                    raise RuntimeError
            assert list(base.edits) == [edit]
            assert torch.equal(answers(base), inside)
    assert torch.equal(answers(base), before)
    edit.apply()
    with suppress(RuntimeError), edit:
        if fails:
            raise RuntimeError
    assert list(base.edits) == [edit]
    with edit:
        edit.rollback()
    edit.rollback()
    with edit:
        pass
    assert list(base.edits) == []
    assert torch.equal(answers(base), before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_inside_the_block_rolls_back(kind):
    base = tiny_base("gpt2")
    before = answers(base)
    with pytest.raises(ZeroDivisionError), KINDS[kind](base):
        1 / 0  # noqa: B018
    assert len(base.edits) == 0
    assert torch.equal(answers(base), before)


@pytest.mark.parametrize("kind", KINDS)
def test_acts_on_direct_calls_and_leaves_weights_alone(kind):
    base = tiny_base("gpt2")
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    raw = raw_logits(base.model)
    with KINDS[kind](base):
        # Prompt edits act where the base model builds rows; the codebook knows another prompt.
        acts = kind in (*WEIGHT_KINDS, "bonus", "composite", "neurons")
        assert torch.equal(raw_logits(base.model), raw) != acts
        for name, tensor in base.model.state_dict().items():
            assert torch.equal(tensor, weights[name])


def test_half_precision_outputs_are_added_to_in_float32():
    base = tiny_base("llama", torch.bfloat16)
    name = base.layout.block(1).down
    a, b = edit_kinds.factors(base, name)
    rows = base.rows(PROMPTS)
    with torch.no_grad(), capture(base.model, [name]) as plain:
        base.forward(rows)
    edit = LowRankEdit(base, {name: (a, b)})
    with edit, torch.no_grad(), capture(base.model, [name]) as seen:
        base.forward(rows)
    change = plain.inputs[name].float() @ a.T @ b.T
    wanted = (plain.outputs[name].float() + change).bfloat16()
    assert torch.equal(seen.outputs[name], wanted)
    assert not torch.equal(seen.outputs[name], plain.outputs[name] + change.bfloat16())


def test_edits_add_up_and_leave_in_any_order():
    base = tiny_base("llama")
    edits = [edit_kinds.low_rank(base), edit_kinds.dense(base), edit_kinds.codebook(base)]
    alone = {}
    for kept in ([0], [0, 2], [1, 2], [2]):
        for i in kept:
            edits[i].apply()
        alone[tuple(kept)] = answers(base)
        base.edits.clear()
    for edit in edits:
        edit.apply()
    assert base.edits.ids == tuple(edit.id for edit in edits)
    edits[1].rollback()  # from the middle
    assert torch.equal(answers(base), alone[0, 2])
    edits[2].rollback()
    assert torch.equal(answers(base), alone[0,])
    edits[1].apply()
    edits[2].apply()
    edits[0].rollback()  # from below
    assert torch.equal(answers(base), alone[1, 2])
    edits[1].rollback()
    assert torch.equal(answers(base), alone[2,])
    edits[2].rollback()


def test_the_stack_is_ordered_and_can_be_read():
    base = tiny_base("gpt2")
    first, second = edit_kinds.low_rank(base), edit_kinds.dense(base)
    assert not base.edits.active
    with second, first:
        assert list(base.edits) == [second, first]
        assert base.edits[0] is second
        assert len(base.edits) == 2
        assert base.edits.active
        assert first.id in repr(base.edits)


def test_later_facts_in_the_context_win_and_the_most_similar_one_is_stated():
    base = tiny_base("llama")
    old = PromptEdit(base, [PromptEntry("Lyon is in", "Lyon is in Spain. ")])
    new = PromptEdit(base, [PromptEntry("Lyon is in", "Lyon is in Norway. ")])
    other = PromptEdit(base, [PromptEntry("Marie Curie was born in", "Curie: Berlin. ")])
    encode = base.encoder.encode
    with old, other:
        assert base.encode("Lyon is in") == encode("Lyon is in Spain. Lyon is in")
        assert base.encode("Curie was born in") == encode("Curie: Berlin. Curie was born in")
        with new:
            assert base.encode("Lyon is in") == encode("Lyon is in Norway. Lyon is in")
    assert base.encode("Lyon is in") == encode("Lyon is in")


def test_suspended_answers_as_the_base_model():
    base = tiny_base("llama")
    before, texts = answers(base), base.generate(PROMPTS, max_new_tokens=4)
    with edit_kinds.composite(base), edit_kinds.codebook(base):
        edited = answers(base)
        with base.edits.suspended():
            assert not base.edits.active
            assert torch.equal(answers(base), before)
            assert base.generate(PROMPTS, max_new_tokens=4) == texts
            with base.edits.suspended():
                pass
            assert torch.equal(answers(base), before), "an inner block ended the outer one"
        assert torch.equal(answers(base), edited)
        with pytest.raises(KeyError), base.edits.suspended():
            raise KeyError
        assert torch.equal(answers(base), edited)


def test_restored_brings_the_stack_back_whatever_happened():
    base = tiny_base("llama")
    first, second = edit_kinds.low_rank(base), edit_kinds.dense(base)
    with first:
        edited = answers(base)

        def disturb():
            with base.edits.restored():
                first.rollback()
                second.apply()
                raise KeyError

        with pytest.raises(KeyError):
            disturb()
        assert list(base.edits) == [first]
        assert torch.equal(answers(base), edited)


def test_an_edit_that_cannot_be_attached_leaves_the_stack_as_it_was():
    class Broken(LowRankEdit):
        def effects(self):
            return [replace(effect, module="model.layers.9") for effect in super().effects()]

    base = tiny_base("llama")
    name = base.layout.block(1).down
    broken = Broken(base, {name: edit_kinds.factors(base, name)})
    with edit_kinds.low_rank(base) as edit:
        edited = answers(base)
        with pytest.raises(UnsupportedUseError, match="9"):
            broken.apply()
        assert list(base.edits) == [edit]
        assert torch.equal(answers(base), edited)


# ---- the stack an edit was computed on


def test_applying_on_another_stack_warns_and_names_both_stacks():
    base = tiny_base("llama")
    below = edit_kinds.dense(base)
    edit = edit_kinds.low_rank(base, method="ROME")
    with below, pytest.warns(UserWarning, match=f"no edits, and is applied on top of {below.id}"):
        edit.apply()
    edit.rollback()
    on_top = edit_kinds.low_rank(base, method="ROME", stack=(below.id,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with below, on_top:
            pass
    with pytest.warns(UserWarning, match=f"on top of {below.id}, and is applied on top of no"):
        on_top.apply()
    on_top.rollback()


def test_edits_made_by_hand_belong_to_no_stack():
    base = tiny_base("llama")
    with edit_kinds.dense(base), edit_kinds.low_rank(base):
        pass


@pytest.mark.parametrize("inside", [False, True])
def test_an_edit_that_depends_on_its_stack_refuses_another_and_says_what_to_replay(inside):
    base = tiny_base("llama")
    below = edit_kinds.dense(base)
    edit = edit_kinds.remembering(base, method="AlphaEdit", stack=(below.id,))
    if inside:
        edit = CompositeEdit(base, [edit], edit.origin)
    before = answers(base)
    with pytest.raises(EditOrderError, match=rf"AlphaEdit depends on .*{below.id}.*holds no edits"):
        edit.apply()
    assert torch.equal(answers(base), before)
    with below, edit:
        assert base.edits.ids == (below.id, edit.id)


# ---- what edits remember for later ones


def test_a_memory_changes_nothing_but_the_name_and_the_size():
    base = tiny_base("llama")
    plain, edit = edit_kinds.low_rank(base), edit_kinds.remembering(base)
    with plain:
        edited = answers(base)
    with edit:
        assert torch.equal(answers(base), edited)
    assert edit.nbytes == plain.nbytes + 15 * 8 + 8
    other = LowRankEdit(base, edit.factors, edit.origin, {**edit.memory, "count": torch.ones(1)})
    assert len({plain.id, edit.id, other.id}) == 3
    assert edit.deltas().keys() == plain.deltas().keys()


def test_memories_are_those_of_the_methods_edits_on_the_stack_in_order():
    base = tiny_base("llama")

    def counts():
        return [int(held["count"]) for held in memories(base, "AlphaEdit")]

    def put(seed, method="AlphaEdit", make=edit_kinds.remembering):
        return make(base, seed=seed, method=method, stack=base.edits.ids)

    assert counts() == []
    with base.edits.restored():
        put(0, "UltraEdit").apply()
        put(2).apply()
        put(3, make=edit_kinds.low_rank).apply()
        member = put(0)
        inside = CompositeEdit(base, [member, edit_kinds.dense(base)], member.origin).apply()
        put(1).apply()
        assert counts() == [9, 7, 8]
        inside.rollback()
        assert counts() == [9, 8]


def test_an_earlier_edit_may_leave_and_the_later_one_then_stands_alone():
    base = tiny_base("llama")
    first = edit_kinds.remembering(base, method="AlphaEdit")
    second = edit_kinds.remembering(base, seed=1, method="AlphaEdit", stack=(first.id,))
    with pytest.raises(EditOrderError, match=f"{first.id}.*holds no edits"):
        second.apply()
    with first.apply(), second:
        first.rollback()
        assert [int(m["count"]) for m in memories(base, "AlphaEdit")] == [8]
        second.rollback()
        with pytest.raises(EditOrderError, match="or compute the edit again"):
            second.apply()


# ---- what is refused


@pytest.mark.parametrize("kind", [LowRankEdit, AdapterEdit])
@pytest.mark.parametrize(
    ("family", "module", "reason"),
    [
        ("gpt2", "lm_head", "tied to 'transformer.wte'"),
        ("gpt2", "transformer.wte", "Embedding"),
        ("gpt2", "transformer.h.0.ln_1", "LayerNorm"),
        ("llama", "model.norm", "RMSNorm"),
        ("llama", "model.layers.0.mlp", "MLP"),
        ("llama", "model.layers.0.mlp.bottom_proj", "no module"),
    ],
)
def test_only_free_projections_can_be_edited(kind, family, module, reason):
    base = tiny_base(family)
    with pytest.raises(UnsupportedUseError, match=reason) as caught:
        kind(base, {module: (torch.ones(1, 32), torch.ones(32, 1))})
    assert module in str(caught.value)
    with pytest.raises(UnsupportedUseError, match=reason):
        DenseEdit(base, {module: (torch.ones(32, 32), None)})


def test_an_untied_head_is_a_projection_like_any_other():
    base = tiny_base("llama", tie_word_embeddings=False)
    before = answers(base)
    with LowRankEdit(base, {"lm_head": edit_kinds.factors(base, "lm_head")}):
        assert not torch.equal(answers(base), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_with_layer_and_quantity(value):
    base = tiny_base("gpt2")
    name = base.layout.block(1).down
    d_in, d_out = projection_shape(base.module(name))
    a, b = edit_kinds.factors(base, name)
    bad = a.clone()
    bad[0, 3] = value
    with pytest.raises(NonFiniteError, match=f"low-rank update of layer '{name}' has 1 of"):
        LowRankEdit(base, {name: (bad, b)})
    with pytest.raises(NonFiniteError, match="memory of layer 'keys'"):
        LowRankEdit(base, {name: (a, b)}, memory={"keys": bad})
    delta, bias = torch.zeros(d_out, d_in), torch.zeros(d_out)
    delta[0, 0], bias[1] = value, value
    with pytest.raises(NonFiniteError, match=f"dense update of layer '{name}'"):
        DenseEdit(base, {name: (delta, None)})
    with pytest.raises(NonFiniteError, match=f"bias update of layer '{name}'"):
        DenseEdit(base, {name: (None, bias)})
    entry = CodebookEntry(torch.ones(d_in), torch.full((d_out,), value), (1,), 1.0)
    with pytest.raises(NonFiniteError, match=f"codebook value of layer '{name}'"):
        CodebookEdit(base, name, [entry])


def test_shapes_that_do_not_fit_are_refused_with_both_shapes():
    base = tiny_base("llama")
    name = base.layout.block(0).down  # 48 -> 32
    with pytest.raises(EditFileError, match=rf"\(2, 32\).*'{name}', which maps 48 to 32"):
        LowRankEdit(base, {name: (torch.ones(2, 32), torch.ones(48, 2))})
    with pytest.raises(EditFileError, match=rf"\(3, 48\) and \(32, 2\) do not fit module '{name}'"):
        LowRankEdit(base, {name: (torch.ones(3, 48), torch.ones(32, 2))})
    with pytest.raises(
        EditFileError, match=rf"\(48, 32\) does not fit module '{name}'.*\(32, 48\)"
    ):
        DenseEdit(base, {name: (torch.ones(48, 32), None)})


def test_a_codebook_that_does_not_fit_its_module_is_refused():
    base = tiny_base("llama")
    name = base.layout.block(0).down
    entry = CodebookEntry(torch.ones(32), torch.ones(32), (1,), 1.0)
    with pytest.raises(EditFileError, match=f"32 to 32 values does not fit module '{name}'.* 48"):
        CodebookEdit(base, name, [entry])
    with pytest.raises(UnsupportedUseError, match=r"no module 'model\.layers\.9\.mlp'"):
        CodebookEdit(base, "model.layers.9.mlp", [entry])


def test_a_bias_that_does_not_exist_is_refused():
    base = tiny_base("llama")
    name = base.layout.block(0).down
    with pytest.raises(UnsupportedUseError, match=f"'{name}' has no bias"):
        DenseEdit(base, {name: (None, torch.ones(32))})


# ---- names


def test_equal_edits_have_equal_ids_and_others_do_not():
    base = tiny_base("llama")
    for kind, make in KINDS.items():
        assert make(base).id == make(base).id, kind
    assert len({make(base).id for make in KINDS.values()}) == len(KINDS)
    one = edit_kinds.low_rank(base)
    assert one.id != edit_kinds.low_rank(base, seed=1).id
    assert one.id != edit_kinds.low_rank(base, method="ROME").id
    moved = {name.replace("layers.1", "layers.0"): pair for name, pair in one.factors.items()}
    assert one.id != LowRankEdit(base, moved, one.origin).id


def test_the_size_of_an_edit_counts_what_it_stores():
    base = tiny_base("llama")
    edit = edit_kinds.low_rank(base)
    assert edit.nbytes == 2 * (2 * 48 + 32 * 2) * 8
    assert 100 < edit_kinds.prompt_edit(base).nbytes < 400


def test_an_edit_shows_its_kind_method_and_number_of_facts():
    base = tiny_base("llama")
    assert repr(edit_kinds.low_rank(base, method="ROME")).endswith("by ROME, 0 facts>")
    assert "by hand" in repr(edit_kinds.dense(base))
    assert len(ANSWERS) == 4


# ---- rows that carry edits of their own


def _carriers(base):
    return [
        edit_kinds.low_rank(base),
        edit_kinds.codebook(base, PROMPTS[1], "all", layer=1),
        edit_kinds.dense(base, 1),
        CompositeEdit(base, [edit_kinds.adapter(base), edit_kinds.codebook(base, PROMPTS[3])]),
    ]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "opt", "t5"])
def test_each_row_may_carry_an_edit_of_its_own(family, stacked):
    base = tiny_base(family)
    edits = _carriers(base)
    below = [edit_kinds.dense(base, 0), edit_kinds.codebook(base, PROMPTS[2])] if stacked else []
    for edit in below:
        edit.apply()
    before, texts = answers(base), base.generate(PROMPTS, max_new_tokens=4)
    wanted, wanted_texts = before.clone(), list(texts)
    for row, edit in enumerate(edits):
        with edit:
            wanted[row] = answers(base)[row]
            wanted_texts[row] = base.generate(PROMPTS, max_new_tokens=4)[row]
    with base.edits.carried(edits):
        assert base.edits.active
        assert len(base.edits) == len(below)
        torch.testing.assert_close(answers(base), wanted, rtol=0, atol=1e-9)
        assert base.generate(PROMPTS, max_new_tokens=4) == wanted_texts
        with base.edits.suspended():
            assert not base.edits.active
            assert torch.equal(answers(base), _plain(family))
    assert torch.equal(answers(base), before)
    assert wanted_texts != texts
    with base.edits.carried([None, edits[1], None, edits[1]]):
        two = answers(base)
    assert torch.equal(two[[0, 2, 3]], before[[0, 2, 3]])  # its prompt is that of the second row
    torch.testing.assert_close(two[1], wanted[1], rtol=0, atol=1e-9)
    base.edits.clear()


def _plain(family):
    return answers(tiny_base(family))


def test_beams_carry_the_edit_of_their_row():
    base = tiny_base("llama")
    edit = edit_kinds.codebook(base, PROMPTS[1], "all")
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}
    wanted = base.generate(PROMPTS[:1], **options)
    with edit:
        wanted += base.generate(PROMPTS[1:2], **options)
    with base.edits.carried([None, edit]):
        assert base.generate(PROMPTS[:2], **options) == wanted


def test_carried_edits_are_counted_and_leave_whatever_happens():
    base = tiny_base("llama")
    before = answers(base)
    edits = [edit_kinds.low_rank(base, seed=i) for i in range(3)]
    with pytest.raises(UnsupportedUseError, match=r"given for 3 rows, and .* called with 4"):
        _carry(base, edits)
    assert torch.equal(answers(base), before)
    assert not base.edits.active
    late = edit_kinds.dense(base)
    with base.edits.carried([edits[0], None, None, None]), late:
        both = answers(base)
    with late:
        alone = answers(base)
    assert torch.equal(both[1:], alone[1:])
    assert not torch.equal(both[0], alone[0])


def _carry(base, edits):
    with base.edits.carried(edits):
        answers(base)


@pytest.mark.parametrize("kind", ["prompt", "bonus", "composite"])
def test_edits_that_know_no_rows_are_not_carried(kind):
    base = tiny_base("llama")
    with pytest.raises(UnsupportedUseError, match=r"acts on prompts or on decoding.*by itself"):
        _carry(base, [KINDS[kind](base)])


def test_carried_edits_keep_to_their_stack():
    base = tiny_base("llama")
    edit = edit_kinds.low_rank(base, method="ROME", stack=("elsewhere",))
    with pytest.warns(UserWarning, match="on top of elsewhere, and is applied on top of no edits"):
        _carry(base, [edit] * 4)
