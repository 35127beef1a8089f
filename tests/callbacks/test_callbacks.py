"""Callbacks: a guard that is loud, a table, and Weights & Biases without a network."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from places import SAMPLES
from rich.console import Console
from support import tiny_base
from toys import Toy

from kedit_lightning import Edit, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.callbacks import EditTable, RollbackGuard, WandbTable
from kedit_lightning.callbacks.rollback_guard import checksum, state_of
from kedit_lightning.data import Requests

FACTS = SAMPLES / "facts.json"


def trainer(**settings: Any) -> EditTrainer:
    return EditTrainer(accelerator="cpu", protocol=Protocol(max_new_tokens=4), **settings)


def facts(limit: int = 2) -> Requests:
    return Requests(path=FACTS, limit=limit)


# ---- rollback guard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_checksum_sees_one_bit_and_the_place(dtype: torch.dtype) -> None:
    tensor = torch.arange(100, 140).to(dtype)
    before = checksum(tensor)
    assert before == checksum(tensor.clone())
    assert before != checksum(tensor.flip(0))
    changed = tensor.clone()
    changed.view(torch.uint8)[17] ^= 1
    assert before != checksum(changed)
    assert checksum(tensor[:0]) == (0, 0)


def test_guard_is_loud_about_a_changed_weight() -> None:
    base = tiny_base("llama")
    weight = base.model.model.layers[2].mlp.down_proj.weight
    before = weight.clone()

    class Writes(Toy):
        def compute_edit(self, requests: Any) -> Edit:
            with torch.no_grad():
                weight[0, 0] += 1e-7
            return super().compute_edit(requests)

    try:
        with pytest.raises(RuntimeError, match=r"weight 'model\.layers\.2\.mlp\.down_proj.*differ"):
            trainer().test(Writes(base_model=base), facts(), verbose=False)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_guard_is_loud_about_a_hook_that_stays() -> None:
    base = tiny_base("llama")
    handles = []

    class Hooks(Toy):
        def compute_edit(self, requests: Any) -> Edit:
            module = self.base.model.model.layers[1]
            handles.append(module.register_forward_hook(lambda *_: None))
            return super().compute_edit(requests)

    with pytest.raises(RuntimeError, match=r"hooks of 'model\.layers\.1' differ"):
        trainer().test(Hooks(base_model=base), facts(), verbose=False)
    for handle in handles:
        handle.remove()


def test_guard_knows_the_stack() -> None:
    base = tiny_base("llama")
    edit = Toy(base_model=base).edit(facts(1).examples()[0].requests)
    before = state_of(base)
    with edit:
        assert state_of(base) != before
        trainer().test(Toy(base_model=base), facts(1), verbose=False)
    assert state_of(base) == before
    guards = [c for c in trainer().callbacks if isinstance(c, RollbackGuard)]
    assert len(guards) == 1


# ---- table


def test_table_shows_prompt_before_wanted_and_after() -> None:
    console = Console(file=io.StringIO(), width=160)
    table = EditTable(console=console)
    trainer(callbacks=[table]).test(Toy(base_model=tiny_base("llama")), facts(), verbose=False)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("Amber Falls lies in") == 1
    for text in ("prompt", "before", "wanted", "after", "Norway", "Anna Weiss"):
        assert text in shown


def test_table_grows_on_a_terminal_and_keeps_to_its_length() -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    table = EditTable(console=console, max_rows=1)
    trainer(callbacks=table).test(Toy(base_model=tiny_base("llama")), facts(), verbose=False)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("Amber Falls lies in") >= 1  # shown while it was the latest
    assert "1 earlier ones not shown" in shown


def test_table_is_left_on_the_screen_when_a_run_fails() -> None:
    console = Console(file=io.StringIO(), width=160)
    method = Toy(base_model=tiny_base("llama"), fail_on="Bolt")
    with pytest.raises(ArithmeticError):
        trainer(callbacks=EditTable(console=console)).test(method, facts())
    assert "Norway" in console.file.getvalue()  # type: ignore[attr-defined]


# ---- Weights & Biases


def test_wandb_table_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="kedit", save_dir=str(tmp_path), offline=True)
    try:
        trainer(logger=logger, callbacks=WandbTable(max_rows=3)).test(
            Toy(base_model=tiny_base("llama")), facts(), verbose=False
        )
        summary = logger.experiment.summary
        assert summary["rewrite/tf_tok"] >= summary["rewrite/tf_tok/low"]
        (written,) = tmp_path.rglob("probes_*.table.json")
        table = json.loads(written.read_text())
        assert table["columns"][:5] == ["id", "stage", "kind", "group", "prompt"]
        assert len(table["data"]) == 3
        assert table["data"][0][4] == "Amber Falls lies in"
    finally:
        wandb.finish()
