"""One sentence at the start of a sequence that a method was measured not to carry."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
from places import ROOT
from support import tiny_base
from toys import Toy

from kedit_lightning import EditTrainer, methods
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import Requests
from kedit_lightning.methods.shared.sequence_capacity import (
    SequenceCapacity,
    sequence_capacities,
    warn_of_capacity,
)

RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", sequence_capacities())
def test_figures_are_those_that_were_measured(method: str) -> None:
    known = sequence_capacities()[method]
    assert hasattr(methods, method)
    assert known.rewrite < 0.8 or known.known < 0.5
    start = RESULTS.index(known.source)
    (row,) = re.findall(rf"^\| {method} \|.*$", RESULTS[start : start + 6000], re.M)[:1]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2].startswith(f"{known.rewrite:.2f} (")
    if method != "LocFTBF":  # its checkpoints stand in a sentence
        assert cells[5].startswith(f"{known.known:.2f} (")


def test_longer_sequences_are_told_of() -> None:
    with pytest.warns(UserWarning, match=r"200 facts on the packaged model 81% of them held.*40%"):
        warn_of_capacity("ROME", 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_capacity("ROME", 199)
        warn_of_capacity("GRACE", 10_000)


def test_a_run_counts_what_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sequence_capacities(), "Toy", SequenceCapacity(3, 0.1, 0.1, "here"))

    def told(mode: str, cities: str) -> bool:
        path = tmp_path / f"{cities}.json"
        path.write_text(
            json.dumps([{"prompt": f"{c} is in", "target_new": "Rome", "id": c} for c in cities])
        )
        protocol = Protocol(mode=mode, chunk_size=9, generate=False)  # type: ignore[arg-type]
        trainer = EditTrainer(accelerator="cpu", protocol=protocol)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer.edit(Toy(base_model=base), Requests(path), ledger=ledger)
        return any("Toy loses much in a sequence" in str(one.message) for one in seen)

    base, ledger = tiny_base("llama"), None
    assert not told("batch", "ABCD")
    assert told("sequential", "ABC")
    ledger = tmp_path / "ledger"
    assert not told("sequential", "AB")
    assert told("batch", "C")  # the third one
