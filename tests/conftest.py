"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before transformers or datasets are imported: a test may never reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest

import kedit_lightning

# Collecting imports torch, Lightning and transformers and makes thousands of items. None of it is
# garbage, and looking for some takes a third of the time.
gc.disable()
# pytest keeps tests with rewritten assertions as bytecode. Without it, each process rewrites each
# module again, which takes another third; so it is kept where PYTHONDONTWRITEBYTECODE is set too.
sys.dont_write_bytecode = False

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_finish() -> None:
    """Collect garbage again, of what tests make: all that was imported stays."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One thread, no command line of pytest's, and a cache of the test's own."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["kedit"])
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that leaves an edit, a hook or a changed weight on a base model it made."""
    import torch

    from kedit_lightning.edits.weight_storage import stored_tensors

    def local(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    BaseModel = kedit_lightning.BaseModel
    made: list[tuple[kedit_lightning.BaseModel, dict[str, torch.Tensor]]] = []
    original = BaseModel.__init__

    def remember(self: kedit_lightning.BaseModel, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        if sum(p.numel() for p in self.model.parameters()) < 20_000_000:
            made.append((self, {n: local(t).clone() for n, t in stored_tensors(self.model)}))

    monkeypatch.setattr(BaseModel, "__init__", remember)
    yield
    for base, weights in made:
        assert len(base.edits) == 0, f"edits left on {base}"
        hooked = [
            name
            for name, module in base.model.named_modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            # those of transformers record hidden states, once somebody has asked for them
            if not hook.__module__.startswith(("transformers.", "torch.distributed."))
        ]
        assert not hooked, f"hooks left on {hooked}"
        for name, tensor in stored_tensors(base.model):
            same = torch.equal(local(tensor).nan_to_num(), weights[name].nan_to_num())
            assert same, f"{name} changed"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets, where it is present."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables that tests hand in with ``record_property("table", text)``.

    Test processes run beside each other have no terminal; a property travels to the one that has.
    """
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, text in getattr(report, "user_properties", ()):
                if name == "table":
                    terminalreporter.section(report.nodeid)
                    terminalreporter.write_line(text)
