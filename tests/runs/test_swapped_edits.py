"""Edits of a run's folder that are not those of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from places import SAMPLES
from support import tiny_base
from toys import Toy

from kedit_lightning import Edit, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import CounterFact
from kedit_lightning.errors import EditFileError
from kedit_lightning.runs.saved_stack import load_stack


def run(folder: Path, resume: bool = False, mode: Any = "single") -> None:
    protocol = Protocol(mode=mode, chunk_size=1, generate=False)
    trainer = EditTrainer(accelerator="cpu", protocol=protocol)
    where = {"resume" if resume else "output": folder}
    data = CounterFact(path=SAMPLES / "counterfact_nested.json")
    trainer.test(Toy(base_model=tiny_base("llama")), data, verbose=False, **where)


def first_two(folder: Path) -> list[Path]:
    return sorted((folder / "edits").iterdir())[:2]


def swap(folder: Path) -> None:
    one, other = first_two(folder)
    content = one.read_bytes()
    shutil.copy(other, one)
    other.write_bytes(content)


def flip(folder: Path) -> None:
    path = first_two(folder)[0]
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = first_two(folder)[0]
    path.write_bytes(path.read_bytes()[:-9])


CHANGES = (swap, flip, cut)


@pytest.mark.parametrize("mode", ["single", "sequential"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_not_continued_with_them(change, mode, tmp_path):
    run(tmp_path, mode=mode)
    change(tmp_path)
    (tmp_path / "results.jsonl").write_text("")  # as if it had been broken off after the edits
    with pytest.raises(EditFileError, match=f"{tmp_path}/edits/.*delete that file"):
        run(tmp_path, resume=True, mode=mode)


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_run_is_not_continued_with_them(change, tmp_path):
    run(tmp_path)
    change(tmp_path)
    order = (tmp_path / "stack.json").read_bytes()
    with pytest.raises(EditFileError, match=f"{tmp_path}/edits/"):
        run(tmp_path, resume=True)
    assert (tmp_path / "stack.json").read_bytes() == order


def test_an_edit_that_was_computed_otherwise_is_not_that_of_the_scores(tmp_path):
    run(tmp_path)
    path = first_two(tmp_path)[0]
    base = tiny_base("llama")
    requests = Edit.load(path, base).origin.requests
    Toy(base_model=base, strength=1.0).edit(requests).save(path)
    with pytest.raises(EditFileError, match=r"has the scores of edit .*put that edit back"):
        run(tmp_path, resume=True)


def test_the_way_out_that_the_message_names_leads_out(tmp_path):
    run(tmp_path)
    before = first_two(tmp_path)[0].read_bytes()
    swap(tmp_path)
    (tmp_path / "results.jsonl").write_text("")
    for path in first_two(tmp_path):
        path.unlink()
    run(tmp_path, resume=True)
    assert first_two(tmp_path)[0].read_bytes() == before


def entries(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stack.json").read_text())


@pytest.mark.parametrize("field", ["id", "sha256", "requests"])
def test_a_stack_of_other_edits_is_refused(field, tmp_path):
    run(tmp_path)
    base = tiny_base("llama")
    assert len(load_stack(tmp_path, base)) == 5
    stack = entries(tmp_path)
    one, other = stack["edits"][:2]
    one[field], other[field] = other[field], one[field]
    (tmp_path / "stack.json").write_text(json.dumps(stack))
    with pytest.raises(EditFileError, match=f"{first_two(tmp_path)[0].name} is not the edit"):
        load_stack(tmp_path, base)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "5", "{}", "[" * 9999, "\udcff"),
        *('{"edits": 5}', '{"edits": [5]}', '{"edits": [{}]}'),
        '{"edits": [{"file": 1, "id": "a", "sha256": "a", "requests": []}]}',
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_damaged_order_is_named(text, tmp_path):
    run(tmp_path)
    (tmp_path / "stack.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(EditFileError, match=f"{tmp_path}/stack.json is damaged") as caught:
        load_stack(tmp_path, tiny_base("llama"))
    assert "\n" not in str(caught.value)


def test_an_edit_that_is_gone_is_named_with_a_way_out(tmp_path):
    run(tmp_path)
    gone = first_two(tmp_path)[0]
    gone.unlink()
    with pytest.raises(EditFileError) as caught:
        run(tmp_path, resume=True)
    lines = tmp_path / "results.jsonl"
    assert str(caught.value) == (
        f"there is no saved edit at {gone}; put it back, or delete the lines with its name in "
        f"{lines} to have edit and scores computed again"
    )
    name = f'"edit_name": "{gone.stem}"'
    kept = [line for line in lines.read_text().splitlines(keepends=True) if name not in line]
    assert len(kept) == 4
    lines.write_text("".join(kept))
    run(tmp_path, resume=True)
    assert gone.is_file()
