"""How many frames of this package lie between a command and the mathematics."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from fit_support import fit
from support import tiny_base
from torch.nn.modules.module import register_module_forward_hook

import kedit_lightning
import kedit_lightning.callbacks
from kedit_lightning.cli.main import main
from kedit_lightning.methods import MEND

PACKAGE = [
    str(Path(module.__file__).parent) for module in (kedit_lightning, kedit_lightning.callbacks)
]


def is_own(code: CodeType) -> bool:
    """Whether code belongs to this package."""
    return any(Path(code.co_filename).is_relative_to(folder) for folder in PACKAGE)


def own_frames(frame: FrameType | None) -> list[CodeType]:
    """Code of the frames of this package on the stack, innermost first."""

    def frames() -> Iterator[FrameType]:
        current = frame
        while current is not None:
            yield current
            current = current.f_back

    return [frame.f_code for frame in frames() if is_own(frame.f_code)]


def assert_at_most(frames: list[CodeType], depth: int, files: int) -> None:
    """Fail with the whole way when it has more frames, or lies in more files."""
    way = "\n".join(f"{Path(f.co_filename).name}: {f.co_qualname}" for f in reversed(frames))
    assert len(frames) <= depth, f"{len(frames)} frames\n{way}"
    assert len({f.co_filename for f in frames}) <= files, f"too many files\n{way}"


def code_of(hook: Any) -> CodeType:
    """Code that runs when a hook is called."""
    hook = hook.func if isinstance(hook, partial) else hook
    return getattr(hook, "__code__", None) or type(hook).__call__.__code__


@pytest.mark.parametrize("facts", [1, 2])
def test_from_kedit_edit_to_the_forward_hook(facts: int, tmp_path: Path) -> None:
    passes: list[list[CodeType]] = []

    def tap(module: torch.nn.Module, args: Any, output: Any) -> None:
        edited = [code for hook in module._forward_hooks.values() if is_own(code := code_of(hook))]
        frames = own_frames(sys._getframe())
        names = {frame.co_qualname for frame in frames}
        # Readings of the base model may try what its architecture can, and have no edit to hook.
        if edited and "Reader.readings" in names and "Reader.base_readings" not in names:
            passes.append([edited[0], *frames])

    lines = ["prompt,subject,target_new", "The capital of France is,France,Lyon"]
    lines += ["The capital of Italy is,Italy,Turin"]
    path = tmp_path / "facts.csv"
    path.write_text("\n".join(lines[: facts + 1]) + "\n")
    handle = register_module_forward_hook(tap)
    try:
        main(
            [
                *("edit", "-c", "methods/rome", "--model.base_model=nano", "--model.contexts=0"),
                *("--model.statistics=identity", "--model.steps=2", "--trainer.accelerator=cpu"),
                *("--data=Requests", f"--data.path={path}", "--trainer.protocol.chunk_size=2"),
            ]
        )
    finally:
        handle.remove()
    assert {"BaseModel.forward", "greedy_answers"} <= {f.co_qualname for own in passes for f in own}
    for frames in passes:
        assert_at_most(frames, 13, 8)


def test_a_longer_way_is_found() -> None:
    frames = [code_of(assert_at_most)] * 3
    assert_at_most(frames, 3, 1)
    with pytest.raises(AssertionError, match=r"3 frames\n  test_call_depth.py: assert_at_most"):
        assert_at_most(frames, 2, 1)
    with pytest.raises(AssertionError, match="too many files"):
        assert_at_most(frames, 3, 0)


def test_from_a_batch_of_mend_to_its_gradient(tmp_path: Path, monkeypatch: Any) -> None:
    method = MEND(tiny_base("llama"), rank=4, accumulate=2)
    gradient, ways = torch.autograd.grad, []

    def record(*args: Any, **options: Any) -> Any:
        ways.append(own_frames(sys._getframe()))
        return gradient(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", record)
    fit(method, tmp_path)
    assert method.network.updates == 2
    assert {way[0].co_name for way in ways} == {"capture_factors", "_gradient"}
    for way in ways:  # that of the requests, and that of the networks
        assert way[-1].co_name == "training_step"
        assert_at_most(way, 6, 4)
