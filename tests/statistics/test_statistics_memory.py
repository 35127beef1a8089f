"""Damaged statistics of the size that real ones have take no more memory than twice the file."""

from __future__ import annotations

import ctypes
import gc
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import tiny_base

from kedit_lightning import BaseModel
from kedit_lightning.errors import DataFileError
from kedit_lightning.statistics import KeyCollector, TextPass, import_second_moment
from kedit_lightning.statistics.covariance import SecondMoment
from kedit_lightning.statistics.moment_file import KIND, MomentFile, Provenance, write_statistics
from kedit_lightning.statistics.sealed_file import SealedFile

MB = 2**20
WIDTH = 4096  # a matrix of 64 MB
#: What the interpreter takes beside the file: messages, pages of code, arenas of the allocator.
SLACK = 6 * MB


def peak(function: Callable[[], object]) -> int:
    """Bytes by which the resident size grows at most, mapped pages of files with them."""

    def status(name: str) -> int:
        line = Path("/proc/self/status").read_text().split(f"{name}:")[1]
        return int(line.split()[0]) * 1024

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base("llama", torch.float32, intermediate_size=WIDTH, num_hidden_layers=1)


def matrix() -> torch.Tensor:
    keys = torch.rand(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    return keys + keys.T


def sealed(folder: Path, base: BaseModel) -> Path:
    moment = SecondMoment(matrix(), 1000, 0.01)
    origin = Provenance.of(base, "c" * 64, "text", max_tokens=256, texts=3, split=True)
    return write_statistics(folder / "s.safetensors", {base.layout.blocks[0].down: moment}, origin)


def format_1(folder: Path, base: BaseModel) -> Path:
    file = SealedFile(sealed(folder, base), KIND)
    values = {n: v for n, v in file.values.items() if n not in ("texts", "split")}
    metadata = {KIND: json.dumps({**values, "format_version": 1})}
    save_file(file.tensors(), folder / "old.safetensors", metadata=metadata)
    return folder / "old.safetensors"


def published(folder: Path, base: BaseModel) -> Path:
    arrays = {"mom2.count": 1000, "mom2.mom2": matrix().numpy(), "sample_size": 9}
    np.savez(folder / "moment.npz", **arrays)
    return folder / "moment.npz"


def interrupted(folder: Path, base: BaseModel) -> Path:
    text_pass = TextPass(KeyCollector(base, [base.layout.blocks[0].down]), {"data": "corpus"})
    text_pass.read(0, ["Lyon is in France."])
    text_pass.save()
    return text_pass.path


def read(path: Path, base: BaseModel) -> None:
    MomentFile(path).moment(base.layout.blocks[0].down, WIDTH)


def read_import(path: Path, base: BaseModel) -> None:
    import_second_moment(path, base, base.layout.blocks[0].down)


def damages(raw: bytes) -> dict[str, bytes]:
    """Damage to sizes, header, matrix and end of a file."""
    middle = len(raw) // 2
    return {
        "half": raw[:middle],
        "end": raw[:-9],
        "more": raw + raw[-MB:],
        "bit of the matrix": raw[: middle + 3] + bytes([raw[middle + 3] ^ 64]) + raw[middle + 4 :],
        "first bytes": b"\xff" * 4 + raw[4:],
        "header": raw[:30] + b"9" * 8 + raw[38:],
        "a long header": struct.pack("<Q", len(raw) - 8) + raw[8:],
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident size is read from /proc")
@pytest.mark.parametrize(
    ("make", "reads"), [(sealed, read), (format_1, read), (published, read_import)]
)
def test_damaged_files_take_twice_their_size_at_most(
    make: Callable[[Path, BaseModel], Path],
    reads: Callable[[Path, BaseModel], None],
    tmp_path: Path,
    base: BaseModel,
) -> None:
    path = make(tmp_path, base)
    raw = path.read_bytes()
    for name, damaged in damages(raw).items():
        path.write_bytes(damaged)

        def refused() -> None:
            with pytest.raises(DataFileError):
                reads(path, base)

        assert peak(refused) <= 2 * len(raw) + SLACK, name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident size is read from /proc")
def test_damaged_sums_of_an_interrupted_pass_do_too(tmp_path: Path, base: BaseModel) -> None:
    path = interrupted(tmp_path, base)
    raw, layers = path.read_bytes(), [base.layout.blocks[0].down]
    collector = KeyCollector(base, layers)  # its own sums are there, whatever the file holds
    for name, damaged in damages(raw).items():
        path.write_bytes(damaged)

        def begun_again() -> None:
            assert TextPass(collector, {"data": "corpus"}).batches == 0

        assert peak(begun_again) <= 2 * len(raw) + SLACK, name
