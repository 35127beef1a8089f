"""The reader of edit files for tools that do not use this package."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_kinds import dense, low_rank
from places import ROOT
from support import tiny_base

from kedit_lightning.edits import edit_file


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / "edit_reader.py"))


@pytest.mark.parametrize("make", [low_rank, dense])
@pytest.mark.parametrize("longest", [1 << 20, 10])
def test_changes_are_those_of_the_edit(
    make: Any, longest: int, reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit_file, "_LONGEST", longest)
    edit = make(tiny_base("llama"))
    header, tensors = reader["read"](str(edit.save(tmp_path / "edit.safetensors")))
    assert (header["id"], header["kind"]) == (edit.id, edit.kind)
    found = {f"{name}.weight": change for name, change in reader["changes"](tensors).items()}
    expected = {n: delta for n, delta in edit.deltas().items() if n.endswith("weight")}
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[n], expected[n]) for n in found)


def test_damage_is_noticed(reader: Any, tmp_path: Path) -> None:
    path = low_rank(tiny_base("llama")).save(tmp_path / "edit.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        reader["read"](str(path))
