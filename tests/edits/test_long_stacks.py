"""Long stacks: what an edit says of those below it, and the sum of the lowest ones."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import edit_kinds
import pytest
import torch
from edit_kinds import answers
from support import tiny_base

from kedit_lightning import BaseModel, Edit
from kedit_lightning.edits import LowRankEdit, folded_prefix
from kedit_lightning.edits.effects import RouteRows, WeightDelta
from kedit_lightning.edits.kinds.codebook.codebook import Codebook
from kedit_lightning.edits.stack_chain import StackChain, stack_mark
from kedit_lightning.errors import EditOrderError


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base("gpt2")


def made(base: BaseModel, count: int) -> list[Edit]:
    return [edit_kinds.low_rank(base, seed=seed) for seed in range(count)]


# ---- marks


def test_a_mark_follows_from_all_ids_in_order() -> None:
    ids = [f"{number:016x}" for number in range(40)]
    marks = [stack_mark(ids[:count]) for count in range(41)]
    assert len(set(marks)) == 41
    assert marks[:2] == [(), (ids[0],)]
    assert stack_mark([*ids[:-2], ids[-1], ids[-2]]) != marks[-1]
    assert stack_mark(marks[-1]) == marks[-1]
    chain = StackChain(ids[:7])
    chain.extend(ids[7:])
    assert chain.mark == marks[-1]


def test_the_mark_of_a_stack_is_that_of_its_ids(base: BaseModel) -> None:
    chance, edits = random.Random(0), made(base, 8)
    with base.edits.restored():
        for _ in range(40):
            edit = chance.choice(edits)
            edit.rollback() if edit.applied else edit.apply()
            assert base.edits.mark == stack_mark(base.edits.ids)
            if chance.random() < 0.2:
                edit.rollback()
                edit.note(changed=chance.random())
                edit.apply()
                assert base.edits.mark == stack_mark(base.edits.ids)
        edits[0].apply()
        with pytest.warns(UserWarning, match="before it was copied"):
            twin = BaseModel(copy.deepcopy(base.model), base.tokenizer)
        assert twin.edits.mark == base.edits.mark
        twin.edits.clear()


def test_a_header_does_not_grow_with_the_stack() -> None:
    sizes = [len(str(stack_mark([f"{n:016x}" for n in range(count)]))) for count in (2, 10_000)]
    assert sizes[1] - sizes[0] == 4  # digits of the number of edits


def test_edits_whose_files_list_all_ids_go_on_their_stack(base: BaseModel) -> None:
    with base.edits.restored():
        below = [edit.apply() for edit in made(base, 3)]
        listed = edit_kinds.remembering(
            base, method="AlphaEdit", stack=tuple(edit.id for edit in below)
        )
        listed.apply()
        listed.rollback()
        below[0].rollback()
        with pytest.raises(EditOrderError, match=r"3 edits up to .* holds 2 edits up to"):
            listed.apply()


# ---- sums


@pytest.fixture
def blocks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folded_prefix, "BLOCK", 4)


@pytest.mark.usefixtures("blocks_of_four")
def test_what_is_folded_follows_from_the_stack_alone(base: BaseModel) -> None:
    chance, edits = random.Random(1), made(base, 13)
    with base.edits.restored():
        for _ in range(30):
            edit = chance.choice(edits)
            edit.rollback() if edit.applied else edit.apply()
        for edit in edits:
            edit.rollback()
            edit.apply()
        walked = answers(base)
    fresh = tiny_base("gpt2")
    with fresh.edits.restored():
        for edit in edits:
            edit.rebuilt_on(fresh).apply()
        assert torch.equal(answers(fresh), walked)


def test_a_folded_stack_adds_up(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = made(base, 11)
    edits[6] = edit_kinds.remembering(base)
    plain = {}
    for block in (100, 4):
        monkeypatch.setattr(folded_prefix, "BLOCK", block)
        with base.edits.restored():
            for edit in edits:
                edit.apply()
            plain[block] = answers(base)
            assert len(list(base.edits)) == 11
    assert not torch.equal(plain[100], answers(base))
    assert torch.allclose(plain[100], plain[4], atol=1e-6)


@pytest.mark.usefixtures("blocks_of_four")
def test_edits_that_do_more_than_change_weights_are_not_folded(base: BaseModel) -> None:
    edits = made(base, 10)
    edits[5] = edit_kinds.bonus(base)
    with base.edits.restored():
        for edit in edits:
            edit.apply()
        assert base.edits._prefix._folds[-1].count == 4
        acts = answers(base)
        edits[5].rollback()
        assert not torch.equal(acts, answers(base))
    assert all(isinstance(edit, LowRankEdit) for edit in edits[:5])


# ---- row functions, and stacks that shrink

ROW_FUNCTIONS: dict[str, Callable[[BaseModel, str, int], Edit]] = {
    "codebook": lambda base, prompt, seed: edit_kinds.codebook(base, prompt, seed=seed),
    "side": lambda base, prompt, seed: edit_kinds.side(base, prompt, seed=seed),
    "overlap": lambda base, prompt, seed: edit_kinds.overlap(base, prompt, seed=seed),
    "deferral": lambda base, prompt, seed: edit_kinds.deferral(base, prompt, seed=seed),
    "neurons": lambda base, prompt, seed: edit_kinds.neurons(base, seed=seed),
}


@pytest.mark.parametrize("kind", ROW_FUNCTIONS)
def test_row_functions_that_are_folded_act_as_one_by_one(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    chance = random.Random(2)
    edits: list[Edit] = [
        ROW_FUNCTIONS[kind](base, edit_kinds.PROMPTS[n % 4], 40 + n) for n in range(7)
    ]
    edits.insert(2, edit_kinds.low_rank(base))
    monkeypatch.setattr(folded_prefix, "BLOCK", 2)
    with base.edits.restored():
        for _ in range(25):
            edit = chance.choice(edits)
            edit.rollback() if edit.applied else edit.apply()
            base.edits.effects(RouteRows)
        for edit in edits:
            edit.apply()
        order = list(base.edits)
        assert base.edits._prefix._folds[-1].count == 8
        folded = answers(base)
        order[-1].rollback()
        shorter = answers(base)
    monkeypatch.setattr(folded_prefix, "BLOCK", 100)
    with base.edits.restored():
        for edit in order[:-1]:
            edit.apply()
        assert torch.equal(answers(base), shorter)
        order[-1].apply()
        assert torch.equal(answers(base), folded)


def test_a_codebook_is_written_by_the_pass_that_needs_it(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    nearest = Codebook.nearest

    def counted(book: Codebook, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        looked.append(len(book.labels))
        return nearest(book, queries)

    edits = [edit_kinds.codebook(base, prompt, seed=n) for n, prompt in enumerate("abcd")]
    with base.edits.restored():
        monkeypatch.setattr(Codebook, "nearest", counted)
        for edit in edits:
            edit.apply()
        edits[-1].rollback()
        assert looked == []
        answers(base)
        assert looked == [1, 2, 3]  # two entries behind the first, and the rows


def test_rolling_back_one_after_another_sums_few_edits_anew(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed: list[int] = []
    plain = folded_prefix.sum_deltas

    def counted(deltas: list[WeightDelta], module: torch.nn.Module) -> WeightDelta | None:
        summed.append(len(deltas))
        return plain(deltas, module)

    monkeypatch.setattr(folded_prefix, "sum_deltas", counted)
    monkeypatch.setattr(folded_prefix, "BLOCK", 4)
    edits = made(base, 200)
    with base.edits.restored():
        for edit in edits:
            edit.apply()
        assert len(summed) == 100  # two modules
        assert len(base.edits._prefix._folds) <= 4
        for edit in reversed(edits):
            edit.rollback()
            assert not edit.applied
        assert len(summed) < 100 + 4 * 200
    assert not list(base.edits)
