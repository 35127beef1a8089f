"""Edits of all methods and kinds, applied and taken off in random ways."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_kinds import KINDS, answers, raw_logits
from method_examples import METHODS, make
from support import FAMILIES, REQUESTS, tiny_base

from kedit_lightning import BaseModel, Edit
from kedit_lightning.errors import EditOrderError

pytestmark = [
    pytest.mark.filterwarnings("ignore:UltraEdit has seen"),
    pytest.mark.filterwarnings("ignore:edit .* was computed on top of"),
    pytest.mark.filterwarnings("ignore:the model of .* carries"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SETTINGS = dict(METHODS)
MAKERS = [*SETTINGS, *KINDS]
EDITS, STEPS = 4, 14
FAST, ALL, BLOCK = 15, 180, 15


@cache
def compute(name: str, family: str, dtype: torch.dtype) -> Edit:
    """An edit by a method, or one of a kind, which no test applies: they apply loaded copies."""
    base = tiny_base(family, dtype)
    return (
        make(name, SETTINGS[name], base).edit(REQUESTS) if name in SETTINGS else KINDS[name](base)
    )


def makers(seed: int) -> list[str]:
    """Who makes the edits of a sequence; a few sequences in a row have all of ``MAKERS``."""
    shares = -(-len(MAKERS) // EDITS)
    order = random.Random(seed // shares).sample(MAKERS, len(MAKERS))
    return [*order[seed % shares :: shares], *order][:EDITS]


class Walk:
    """A base model, edits, and the answers under each stack so far."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.chance = random.Random(seed)
        self.folder = folder
        self.fresh = lambda: tiny_base(
            FAMILIES[seed % len(FAMILIES)], DTYPES[seed // len(FAMILIES) % len(DTYPES)]
        )
        self.base = self.fresh()
        made = [compute(name, self.base.name, self.base.dtype) for name in makers(seed)]
        self.paths = [edit.save(folder / f"{edit.id}.safetensors") for edit in made]
        self.edits = [Edit.load(path, self.base) for path in self.paths]
        self.known: dict[tuple[str, ...], torch.Tensor] = {}
        self.clean = self.check(self.base)

    def check(self, base: BaseModel, stack: tuple[str, ...] | None = None) -> torch.Tensor:
        """The answers of a base model, which are those of the same stack before."""
        stack = base.edits.ids if stack is None else stack
        found = answers(base)
        assert torch.equal(found, self.known.setdefault(stack, found)), stack
        return found

    def try_to_apply(self, edit: Edit) -> None:
        before = self.base.edits.ids
        try:
            edit.apply()
        except EditOrderError:
            assert edit.requires_its_stack
            assert self.base.edits.ids == before

    # ---- steps

    def apply(self) -> None:
        off = [edit for edit in self.edits if not edit.applied]
        self.try_to_apply(self.chance.choice(off or self.edits))

    def roll_back(self) -> None:
        self.chance.choice(self.edits).rollback()

    def nest(self) -> None:
        before = self.base.edits.ids
        with ExitStack() as blocks:
            for edit in self.chance.choices(self.edits, k=3):
                if edit.applied or not edit.requires_its_stack:
                    blocks.enter_context(edit)
                self.check(self.base)
        assert self.base.edits.ids == before

    def restore(self) -> None:
        before = self.base.edits.ids
        with suppress(ZeroDivisionError), self.base.edits.restored():
            for edit in self.chance.sample(self.edits, 2):
                edit.rollback() if edit.applied else self.try_to_apply(edit)
            self.check(self.base)
            raise ZeroDivisionError
        assert self.base.edits.ids == before

    def suspend(self) -> None:
        with self.base.edits.suspended():
            self.check(self.base, ())

    def reload(self) -> None:
        number = self.chance.randrange(EDITS)
        edit = self.edits[number]
        again = Edit.load(edit.save(self.folder / "again.safetensors"), self.base)
        assert again.id == edit.id
        if not edit.applied:
            self.edits[number] = again

    def copy_model(self) -> None:
        twin = BaseModel(copy.deepcopy(self.base.model), self.base.tokenizer, self.base.name)
        self.check(twin)
        twin.edits.clear()
        self.check(twin)

    def move_to_copy(self) -> None:
        left, self.base = self.base, copy.deepcopy(self.base)
        self.check(self.base)
        left.edits.clear()
        self.check(left)
        applied = {edit.id: edit for edit in self.base.edits}
        loaded = [Edit.load(edit.save(self.folder / "moved"), self.base) for edit in self.edits]
        self.edits = [applied.get(edit.id, edit) for edit in loaded]

    def walk(self) -> None:
        """Random steps, each followed by a check; then everything is taken off in random order."""
        steps: list[Callable[[], Any]] = [self.nest, self.restore, self.suspend, self.reload]
        steps += [self.copy_model, self.move_to_copy, *[self.apply] * 4, *[self.roll_back] * 2]
        for step in self.chance.choices(steps, k=STEPS):
            step()
            self.check(self.base)
        self.replay()
        for edit in self.chance.sample(self.edits, EDITS):
            edit.rollback()
            self.check(self.base)
        assert self.base.edits.ids == ()
        fresh = self.fresh()
        assert torch.equal(answers(self.base), self.clean)
        assert torch.equal(raw_logits(self.base.model), raw_logits(fresh.model))
        assert self.base.full_fingerprint == fresh.full_fingerprint

    def replay(self) -> None:
        """A fresh model with the same stack, from files, gives the same answers."""
        fresh, files = self.fresh(), {path.stem: path for path in self.paths}
        for name in self.base.edits.ids:
            edit = Edit.load(files[name], fresh)
            if not edit.requires_its_stack or fresh.edits.mark == edit.origin.stack:
                edit.apply()
        self.check(fresh)
        fresh.edits.clear()


@pytest.mark.parametrize("seed", range(FAST))
def test_any_sequence_ends_where_it_began(seed: int, tmp_path: Path) -> None:
    Walk(seed, tmp_path).walk()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(FAST, ALL, BLOCK))
def test_many_sequences_end_where_they_began(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + BLOCK):
        Walk(seed, tmp_path).walk()


def test_a_few_sequences_have_all_methods_and_kinds() -> None:
    assert {name for seed in range(FAST) for name in makers(seed)} == {*MAKERS}
