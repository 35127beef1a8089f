"""The ledger: what stands in it, and that a reverted edit leaves nothing behind."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_kinds import answers
from method_examples import METHODS, make
from support import REQUESTS, tiny_base

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.errors import (
    BaseModelMismatchError,
    EditFileError,
    EditOrderError,
    InvalidRequestError,
    LedgerError,
    OutputFolderError,
)
from kedit_lightning.methods import FTM
from kedit_lightning.runs import Ledger

pytestmark = [
    pytest.mark.filterwarnings("ignore:UltraEdit has seen"),
    pytest.mark.filterwarnings("ignore:.*stands? in .* already"),
    pytest.mark.filterwarnings("ignore::kedit_lightning.errors.FactsNotWrittenWarning"),
    pytest.mark.filterwarnings("ignore:.*target.*"),
]
SETTINGS = dict(METHODS)
#: A method of each kind of edit: dense, low-rank, adapter, codebook, side memory, prompt, decoding,
#: and low-rank with a memory.
QUICK = ("FTM", "MEMIT", "LoRA", "GRACE", "MEMOIR", "ICE", "DoLa", "AlphaEdit", "IKE")
FTM_SETTINGS = {"lr": 1e-2, "steps": 2}


class Walk:
    """A ledger that random edits are added to and taken from, and which edits should stand."""

    def __init__(self, names: list[str], seed: int, folder: Path) -> None:
        self.chance, self.folder = random.Random(seed), folder
        self.base = tiny_base("gpt2")
        self.clean = answers(self.base)
        self.methods = [make(name, SETTINGS[name], self.base) for name in names]
        self.ledger = Ledger(folder / "walked")
        self.standing: dict[int, tuple[Any, EditRequest]] = {}

    def append(self) -> None:
        method = self.methods[len(self.ledger.lines) % len(self.methods)]
        free = [r for r in REQUESTS if r not in [one for _, one in self.standing.values()]]
        if free:
            request = self.chance.choice(free)
            self.standing[self.ledger.append(method, [request]).number] = method, request

    def revert(self) -> None:
        if self.standing:
            number = self.chance.choice(list(self.standing))
            self.ledger.revert(number, self.base, later="replay", methods=self.methods)
            del self.standing[number]

    def reopen(self) -> None:
        moved = self.folder / str(len(list(self.folder.iterdir())))
        self.ledger = Ledger(shutil.copytree(self.ledger.path, moved))

    def replay(self) -> None:
        replayed = self.ledger.replay(self.base, methods=self.methods)
        assert [r.line.number for r in replayed if not r.equal] == []
        assert [r.line.number for r in replayed] == list(self.standing)

    def check(self) -> None:
        """Answers are those of a model that had the standing edits alone."""
        fresh = Ledger(self.folder / f"fresh-{self.chance.random()}")
        for method, request in self.standing.values():
            fresh.append(method, [request])
        with fresh.applied(self.base):
            expected = answers(self.base)
        with self.ledger.applied(self.base):
            assert torch.equal(answers(self.base), expected)
        assert torch.equal(answers(self.base), self.clean)
        assert not self.base.edits.ids


@pytest.mark.parametrize("seed", range(3))
def test_what_stands_is_as_if_nothing_else_had_been(seed: int, tmp_path: Path) -> None:
    names = random.Random(7).sample(QUICK, len(QUICK))[3 * seed :][:3]
    walk_through(Walk(names, seed, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(9))
def test_the_same_of_all_methods(seed: int, tmp_path: Path) -> None:
    names = random.Random(8).sample(list(SETTINGS), len(SETTINGS))[seed::9]
    walk_through(Walk(names, seed, tmp_path))


def walk_through(walk: Walk) -> None:
    steps = [walk.append] * 2 + [walk.revert, walk.reopen, walk.replay]
    for step in [walk.append] * 3 + [walk.revert] + walk.chance.choices(steps, k=3):
        step()
    walk.check()
    for number in list(walk.standing):
        walk.ledger.revert(number, walk.base, later="replay", methods=walk.methods)
    with walk.ledger.applied(walk.base):
        assert torch.equal(answers(walk.base), walk.clean)


# ---- one ledger of three edits


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base("gpt2")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, base: BaseModel) -> Path:
    folder = tmp_path_factory.mktemp("written") / "ledger"
    ledger, method = Ledger(folder), FTM(base_model=base, **FTM_SETTINGS)
    for request in REQUESTS[:3]:
        ledger.append(method, [request])
    return folder


@pytest.fixture
def ledger(written: Path, tmp_path: Path) -> Ledger:
    return Ledger(shutil.copytree(written, tmp_path / "ledger"))


@pytest.fixture
def method(base: BaseModel) -> FTM:
    return FTM(base_model=base, **FTM_SETTINGS)


def test_lines_chain(ledger: Ledger) -> None:
    assert [line.number for line in ledger.lines] == [1, 2, 3]
    assert [line.parent for line in ledger.lines] == ["", *[x.id for x in ledger.lines[:2]]]
    assert ledger.requests == REQUESTS[:3]
    assert ledger.show(2) is ledger.show(ledger.lines[1].id[:6]) is ledger.lines[1]


@pytest.mark.parametrize("name", ["0", "4", "abcd", "ab"])
def test_an_unknown_line_is_refused(ledger: Ledger, name: str) -> None:
    with pytest.raises(LedgerError, match="no line"):
        ledger.show(name)


def test_a_fact_that_stands_is_not_written_again(ledger: Ledger, method: FTM) -> None:
    with pytest.raises(InvalidRequestError, match="all of these facts"):
        ledger.append(method, REQUESTS[:2])
    with pytest.warns(UserWarning, match="1 fact stands"):
        line = ledger.append(method, [REQUESTS[1], REQUESTS[3]])
    assert line.requests == (REQUESTS[3],)


def test_a_fact_that_was_changed_back_is_no_repetition(ledger: Ledger, method: FTM) -> None:
    first = REQUESTS[0]
    other = EditRequest(first.prompt, "Oslo", first.subject)
    with pytest.warns(UserWarning, match="contradictory targets"):
        ledger.append(method, [other])
    with pytest.warns(UserWarning, match="contradictory targets"):
        assert ledger.append(method, [first]).requests == (first,)


def test_contradictions_are_refused_before_anything_is_computed(
    ledger: Ledger, method: FTM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "edit", None)  # it cannot be called
    other = EditRequest(REQUESTS[0].prompt, "Oslo", REQUESTS[0].subject)
    with pytest.raises(InvalidRequestError, match="contradictory targets"):
        ledger.append(method, [other], on_conflict="refuse")


def test_later_edits_may_be_kept(ledger: Ledger, base: BaseModel, method: FTM) -> None:
    kept = [saved for number, saved in ledger.standing.items() if number != 1]
    ledger.revert(1, base, later="keep")
    assert list(ledger.standing.values()) == kept
    assert ledger.append(method, [REQUESTS[3]]).number == 5
    assert list(Ledger(ledger.path).standing) == [2, 3, 5]


def test_edits_that_read_memories_are_not_kept(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    method, ledger = make("AlphaEdit", SETTINGS["AlphaEdit"], base), Ledger(tmp_path / "ledger")
    for request in REQUESTS[:2]:
        ledger.append(method, [request])
    with pytest.raises(EditOrderError, match="line 2 by AlphaEdit"):
        ledger.revert(1, base, later="keep")
    assert list(Ledger(ledger.path).standing) == [1, 2]


def test_only_what_stands_is_reverted(ledger: Ledger, base: BaseModel) -> None:
    ledger.revert(3, base)
    with pytest.raises(LedgerError, match="reverted already, by line 4"):
        ledger.revert(3, base)
    with pytest.raises(LedgerError, match="cannot be reverted itself"):
        ledger.revert(4, base)


def test_dropped_lines_are_left_out_of_a_replay(ledger: Ledger, base: BaseModel) -> None:
    replayed = ledger.replay(base, drop=[2])
    assert [(r.line.number, r.equal) for r in replayed] == [(1, True), (3, False)]
    copied = ledger.copy(replayed, ledger.path.with_name("copy"))
    ledger.revert(2, base)
    assert list(copied.standing.values()) == list(ledger.standing.values())
    with pytest.raises(LedgerError, match="holds a ledger already"):
        ledger.copy(replayed, copied.path)


def test_another_method_of_the_name_does_not_replay(ledger: Ledger, base: BaseModel) -> None:
    text = ledger.file.read_text()
    assert '"given": {' in text
    ledger.lines = [
        line if line.number != 3 else type(line)(**{**vars(line), "given": None})
        for line in ledger.lines
    ]
    with pytest.raises(LedgerError, match="line 3 cannot be computed again"):
        ledger.replay(base, methods=[FTM(base_model=base, lr=5e-2, steps=2)])
    assert all(r.equal for r in ledger.replay(base, methods=[FTM(base, **FTM_SETTINGS)]))


def test_a_base_model_with_other_edits_is_refused(
    ledger: Ledger, base: BaseModel, method: FTM
) -> None:
    with (
        method.edit([REQUESTS[3]]),
        pytest.raises(EditOrderError, match="roll them back"),
        ledger.applied(base),
    ):
        pass


def test_another_base_model_is_refused(ledger: Ledger) -> None:
    with pytest.raises(BaseModelMismatchError):
        ledger.edits(tiny_base("llama"))


def test_edits_computed_apart_are_refused(ledger: Ledger, method: FTM) -> None:
    edit = method.edit([REQUESTS[3]])
    with pytest.raises(EditOrderError, match="computed apart"):
        ledger.write(method, edit, ledger.entries[0].random)


# ---- damage


def test_a_line_cut_by_a_crash_is_no_line(ledger: Ledger, method: FTM) -> None:
    with ledger.file.open("ab") as file:
        file.write(b'{"kind": "edit", "numb')
    again = Ledger(ledger.path)
    assert len(again.lines) == 3
    again.append(method, [REQUESTS[3]])
    assert len(Ledger(ledger.path).lines) == 4


@pytest.mark.parametrize("change", ["fact", "order", "missing", "number"])
def test_changed_lines_are_noticed(ledger: Ledger, change: str) -> None:
    lines = ledger.file.read_text().splitlines()
    if change == "fact":
        lines[1] = lines[1].replace("Berlin", "Munich")
    elif change == "order":
        lines[1], lines[2] = lines[2], lines[1]
    elif change == "missing":
        del lines[0]
    else:
        lines[2] = json.dumps({**json.loads(lines[2]), "number": 7})
    ledger.file.write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerError, match=r"line [123] of .* is damaged"):
        Ledger(ledger.path)


def test_changed_files_are_noticed(ledger: Ledger, base: BaseModel) -> None:
    paths = [ledger.edit_path(saved.id) for saved in ledger.standing.values()]
    shutil.copy(paths[0], paths[1])
    named = rf"edit {paths[1].stem} of line 2, 'Marie Curie was born in' -> ' ?Berlin'"
    with pytest.raises(EditFileError, match=f"names, {named}: its content has changed"):
        ledger.edits(base)
    paths[1].unlink()
    with pytest.raises(EditFileError, match=f"with {named}, is absent"):
        Ledger(ledger.path).edits(base)


def test_one_process_writes_at_a_time(ledger: Ledger, method: FTM) -> None:
    with ledger.writing(), pytest.raises(OutputFolderError, match=r"in use.*with --ledger"):
        Ledger(ledger.path).append(method, [REQUESTS[3]])


def test_loaded_tensors_begin_where_computed_ones_do(ledger: Ledger, base: BaseModel) -> None:
    """A product rounds otherwise where a factor begins elsewhere in memory."""
    for edit in ledger.edits(base):
        assert all(tensor.data_ptr() % 64 == 0 for tensor in edit.state()[0].values())
