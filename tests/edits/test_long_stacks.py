"""Long stacks: what an edit says of those below it, and the sum of the lowest ones."""

from __future__ import annotations

import copy
import random

import edit_kinds
import pytest
import torch
from edit_kinds import answers
from support import tiny_base

from kedit_lightning import BaseModel, Edit
from kedit_lightning.edits import LowRankEdit, folded_prefix
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
    edits[5] = edit_kinds.codebook(base)
    with base.edits.restored():
        for edit in edits:
            edit.apply()
        assert base.edits._prefix._folds[-1][0] == 4
        acts = answers(base)
        edits[5].rollback()
        assert not torch.equal(acts, answers(base))
    assert all(isinstance(edit, LowRankEdit) for edit in edits[:5])
