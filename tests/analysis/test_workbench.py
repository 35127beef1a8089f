"""A model at work: facts tried, written and undone in a ledger."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kedit_lightning import BaseModel, Edit, EditRequest
from kedit_lightning.analysis.workbench import Workbench, fact, method_names, method_of
from kedit_lightning.errors import (
    BaseModelNotFoundError,
    InvalidRequestError,
    LedgerError,
    MissingNeedsError,
)
from kedit_lightning.runs import Ledger

FACT = EditRequest("The sport of LeBron James is", "football", "LeBron James")
NEIGHBOURS = ["The sport of Carmelo Anthony is", "Michelangelo died in"]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.load("nano")


@pytest.fixture
def bench(base: BaseModel) -> Workbench:
    return Workbench(base)


def test_a_fact_is_tried_written_and_undone(bench: Workbench) -> None:
    ids = torch.tensor([[5, 9, 2]])
    before = bench.base.model(ids).logits
    tried = bench.try_method("FTM", FACT, NEIGHBOURS)
    assert tried.holds
    assert (tried.probability or 0) > 0.5
    assert tried.answers[0].before.startswith("basketball")
    assert tried.answers[0].after.startswith("football")
    assert tried.kept == (sum(not a.changed for a in tried.answers[1:]), 2)
    assert bench.entries() == []

    written = bench.write("FTM", FACT, NEIGHBOURS)
    assert written.answers == tried.answers
    assert written.holds
    assert bench.ask([FACT.prompt])[0].after == written.answers[0].after
    assert bench.check() == "1 of 1 fact holds"
    assert [(e.number, e.method, e.state) for e in bench.entries()] == [(1, "FTM", "stands")]
    saved = Edit.load(bench.edit_file(), bench.base)
    assert bench.edit_file().name == "edit-1-FTM.safetensors"
    with saved:
        assert not torch.equal(bench.base.model(ids).logits, before)

    assert "line 1 is undone" in bench.undo()
    assert not bench.ask([FACT.prompt])[0].changed
    assert torch.equal(bench.base.model(ids).logits, before)
    assert bench.entries()[0].state == "reverted"
    with pytest.raises(LedgerError, match="none to undo"):
        bench.undo()
    with pytest.raises(LedgerError, match="no file"):
        bench.edit_file()


def test_an_edit_that_did_not_take_is_said(bench: Workbench) -> None:
    found = bench.try_method("DoLa", FACT)
    assert not found.holds


def test_methods_are_compared_on_top_of_what_stands(bench: Workbench) -> None:
    bench.write("PROMPT", EditRequest("Michelangelo died in", "Berlin", "Michelangelo"))
    without_subject = EditRequest(FACT.prompt, "football")
    prompt, refused = bench.compare(["PROMPT", "ROME"], without_subject)
    assert prompt.answers[0].after.startswith("football")
    assert refused.answers == []
    assert "lacks 'subject'" in refused.error
    assert len(bench.entries()) == 1


def test_a_folder_is_gone_on_with(bench: Workbench, base: BaseModel, tmp_path: Path) -> None:
    assert "has 0 edits" in bench.open(tmp_path / "new")
    bench.write("PROMPT", FACT)
    other = Workbench(base, tmp_path / "new")
    assert other.entries() == bench.entries()
    assert len(Ledger(tmp_path / "new").requests) == 1
    with pytest.raises(InvalidRequestError, match="holds all of these facts already"):
        other.write("PROMPT", FACT)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(LedgerError, match=r"no ledger\.jsonl"):
        bench.open(tmp_path / "other")
    with pytest.raises(LedgerError, match="name the folder"):
        bench.open(" ")
    with pytest.raises(BaseModelNotFoundError):
        bench.load("no-such-model")
    assert len(bench.entries()) == 1  # what could not be opened changed nothing


def test_the_model_of_a_ledger_is_loaded_in_its_type(bench: Workbench, tmp_path: Path) -> None:
    other = BaseModel.load("nano", dtype="float64")
    Ledger(tmp_path / "ledger").append(method_of("PROMPT", other), [FACT])
    bench.open(tmp_path / "ledger")
    assert bench.base.dtype == torch.float64
    assert bench.ask([FACT.prompt])[0].changed


def test_the_methods_offered_need_no_fit(base: BaseModel) -> None:
    names = method_names()
    assert {"ROME", "MEMIT", "FTM", "GRACE", "LoRA"} <= set(names)
    assert not {"MEND", "SERAC", "DoLa", "KN", "InstructEdit"} & set(names)
    assert method_of("GRACE", base).settings.replacement == "last"
    with pytest.raises(MissingNeedsError):
        method_of("KN", base).edit([FACT])
    with pytest.raises(InvalidRequestError, match="subject"):
        fact("Rome is in", "Paris", "Peru")
