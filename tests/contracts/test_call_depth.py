"""How many frames of this package lie between a command and the mathematics."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from support import tiny_base
from test_mend import fit

import kedit_lightning
import kedit_lightning.callbacks
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
