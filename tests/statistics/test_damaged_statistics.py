"""Damaged files of the cache and of imports: one sentence that names the file, or what was kept."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_damage import WAYS, damage
from safetensors.torch import save_file
from support import TEXT, tiny_base

from kedit_lightning import BaseModel
from kedit_lightning.errors import CacheError, DataFileError, StatisticsNotFoundError
from kedit_lightning.methods import ROME
from kedit_lightning.statistics import (
    KeyCollector,
    TextPass,
    chosen_statistics,
    estimate_from_few_samples,
    find_statistics,
    import_second_moment,
    null_space,
    save_to_cache,
)
from kedit_lightning.statistics.moment_file import KIND
from kedit_lightning.statistics.sealed_file import SealedFile, write_sealed

DAMAGED = "it is left out here"
ignore_estimates = pytest.mark.filterwarnings("ignore:key statistics of .* are estimated")


@cache
def base() -> BaseModel:
    return tiny_base("llama")


def layers() -> list[str]:
    return [block.down for block in base().layout.blocks]


def collected(texts: list[str] = TEXT) -> Path:
    """A file of the cache."""
    collector = KeyCollector(base(), layers())
    collector.read(texts)
    return save_to_cache(collector, f"text {len(texts)}")


def as_format_1(path: Path) -> Path:
    """A file as earlier releases wrote it, without hashes."""
    file = SealedFile(path, KIND)
    header = {n: v for n, v in file.values.items() if n not in ("texts", "split")}
    metadata = {KIND: json.dumps({**header, "format_version": 1})}
    save_file(file.tensors(), path, metadata=metadata)
    return path


# ---- single faults


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>")


def bit_of_a_matrix(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[raw.index(SealedFile(path, KIND).tensor(layers()[1]).numpy().tobytes()) + 5] ^= 4
    path.write_bytes(raw)


def digit_of_the_header(path: Path) -> None:
    raw = path.read_bytes()
    count = str(SealedFile(path, KIND).values["counts"][layers()[1]]).encode()
    path.write_bytes(raw.replace(b": " + count, b": 1" + count[1:]))


def newer(path: Path) -> None:
    file = SealedFile(path, KIND)
    write_sealed(path, KIND, {**file.values, "format_version": 3}, file.tensors())


@ignore_estimates
@pytest.mark.parametrize("damage", [half, foreign, bit_of_a_matrix, digit_of_the_header, newer])
def test_a_damaged_file_is_named_and_stops_nothing(damage: Callable[[Path], None]) -> None:
    module = layers()[1]
    good, bad = collected(TEXT[:1]), collected()
    damage(bad)
    with pytest.warns(UserWarning, match=DAMAGED) as told:
        found = find_statistics(base(), module)
    assert str(bad) in str(told[0].message)
    assert found is not None
    assert found.path == good
    if damage is bit_of_a_matrix:  # the other layers are whole
        whole = find_statistics(base(), layers()[0])
        assert whole is not None
        assert whole.path == bad
    good.unlink()
    with pytest.raises(DataFileError, match=str(bad)):
        chosen_statistics(base(), module, bad)
    with (
        pytest.warns(UserWarning, match=DAMAGED),
        pytest.raises(StatisticsNotFoundError, match="run `kedit fit`"),
    ):
        ROME(base(), statistics="required").covariances.cholesky(module)
    rome = ROME(base())
    with pytest.warns(UserWarning, match=DAMAGED):
        rome.covariances.cholesky(module)
    assert rome.covariances.note.startswith("few-sample")


@ignore_estimates
def test_a_damaged_estimate_is_made_again() -> None:
    path = estimate_from_few_samples(base())
    raw = path.read_bytes()
    path.write_bytes(raw[:-9])
    with pytest.warns(UserWarning, match=DAMAGED):
        ROME(base()).covariances.cholesky(layers()[1])
    assert path.read_bytes() == raw


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheError, match=r"cannot be written \(.*KEDIT_CACHE"):
        collected()


def test_a_damaged_null_space_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(null_space, "CACHED_WIDTH", 4)
    keys = torch.randn(40, 8, dtype=torch.float64)
    first = null_space.main_directions(keys.T @ keys, 0.1)
    (path,) = tmp_path.glob("cache/directions/*")
    raw = path.read_bytes()
    for damaged in (raw[:-1], b"", raw[:-4] + b"abcd", raw.replace(b"basis", b"basos")):
        path.write_bytes(damaged)
        again = null_space.main_directions(keys.T @ keys, 0.1)
        assert all(map(torch.equal, first, again))
        assert path.read_bytes() == raw


@pytest.mark.parametrize("change", [{"counts": {}}, {"counts": 5}, {"errors": []}, {"dtype": 1}])
def test_headers_that_say_too_little(change: dict[str, Any]) -> None:
    path = collected()
    file = SealedFile(path, KIND)
    write_sealed(path, KIND, {**file.values, **change}, file.tensors())
    with pytest.raises(DataFileError, match=str(path)):
        chosen_statistics(base(), layers()[0], path)


@pytest.mark.parametrize("spoil", ["asymmetric", "not finite", "negative", "narrow"])
def test_a_matrix_of_format_1_that_is_no_second_moment(spoil: str) -> None:
    path, module = as_format_1(collected()), layers()[1]
    file = SealedFile(path, KIND)
    tensors = file.tensors()
    match spoil:
        case "asymmetric":
            tensors[module][3, 4] += 1e-3
        case "not finite":
            tensors[module][3, 3] = torch.nan
        case "negative":
            tensors[module][3, 3] = -1
        case "narrow":
            tensors[module] = tensors[module][:4, :4].contiguous()
    save_file(tensors, path, metadata={KIND: json.dumps(file.values)})
    with pytest.raises(DataFileError, match=f"{path} is damaged .*'{module}'"):
        chosen_statistics(base(), module, path)
    assert chosen_statistics(base(), layers()[0], path).path == path


# ---- mutants


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """A copy with damage as disks, transfers and editors do it, in the header half of the time."""
    new, size = bytearray(raw), len(raw)
    if raw.startswith(b"PK"):
        ends = chance.choice([(0, 300), (size - 400, size), (0, size)])
    else:
        ends = chance.choice([(0, 8 + struct.unpack("<Q", raw[:8])[0]), (0, size)])
    at = chance.randrange(*ends)
    match chance.randrange(6):
        case way if way < WAYS:
            damage(new, at, way, chance)
        case 5:
            digits = [i for i in range(*ends) if raw[i] in b"0123456789"]
            new[chance.choice(digits)] = chance.choice(b"0123456789")
    return bytes(new)


def assert_sentence(message: str, path: Path) -> None:
    assert "\n" not in message
    assert len(message) < 1000
    assert str(path) in message


def run_cache(seed: int, count: int, old: bool) -> int:
    """Mutants of a file of the cache; the number of those that were loaded."""
    path = as_format_1(collected()) if old else collected()
    raw, module, loaded = path.read_bytes(), layers()[1], 0
    kept = chosen_statistics(base(), module, path)
    chance = random.Random(f"{seed} {old}")
    for _ in range(count):
        path.write_bytes(damaged(raw, chance))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = find_statistics(base(), module)
        for warning in told:
            assert_sentence(str(warning.message), path)
        if found is None:  # damaged, or of another model by now
            continue
        loaded += 1
        same = torch.equal(found.moment.mean, kept.moment.mean)
        if not old:
            assert same
            assert found.moment.count == kept.moment.count
            assert found.provenance == kept.provenance
        else:  # without hashes, what is loaded is a second moment all the same
            assert torch.equal(found.moment.mean, found.moment.mean.T)
    return loaded


def run_pass(seed: int, count: int) -> None:
    """Mutants of the sums of an interrupted pass: continued exactly, or begun again."""

    def start() -> TextPass:
        return TextPass(KeyCollector(base(), layers()), {"data": "corpus"})

    first = start()
    for number, text in enumerate(TEXT[:2]):
        first.read(number, [text])
    first.save()
    raw, kept = first.path.read_bytes(), first.collector.state()
    chance = random.Random(seed)
    for _ in range(count):
        first.path.write_bytes(damaged(raw, chance))
        again = start()
        assert again.batches in (0, 2)
        if again.batches:
            state = again.collector.state()
            assert all(torch.equal(kept[name], tensor) for name, tensor in state.items())


def npz(path: Path, **change: Any) -> Path:
    keys = np.random.default_rng(0).normal(size=(500, 48)).astype(np.float32)
    arrays = {"mom2.count": len(keys), "mom2.mom2": keys.T @ keys, "sample_size": 9}
    np.savez(path, **(arrays | change))
    return path


def run_import(folder: Path, seed: int, count: int) -> int:
    """Mutants of a published file; the number of those that were imported."""
    path, module, loaded = npz(folder / "moment.npz"), layers()[1], 0
    raw, chance = path.read_bytes(), random.Random(seed)
    kept = SealedFile(import_second_moment(path, base(), module), KIND).tensor(module)
    for _ in range(count):
        path.write_bytes(damaged(raw, chance))
        try:
            written = import_second_moment(path, base(), module)
        except DataFileError as error:
            assert_sentence(str(error), path)
            continue
        loaded += 1
        assert torch.equal(SealedFile(written, KIND).tensor(module), kept)
        assert "-500-tokens" in written.name
    return loaded


def test_mutants_are_refused_in_one_sentence_or_are_what_was_kept(tmp_path: Path) -> None:
    run_cache(0, 20, old=False)
    run_cache(0, 20, old=True)
    run_pass(0, 10)
    run_import(tmp_path, 0, 20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
def test_hundreds_of_mutants(seed: int, tmp_path: Path) -> None:
    run_cache(seed, 100, old=False)
    run_cache(seed, 100, old=True)
    run_pass(seed, 60)
    run_import(tmp_path, seed, 150)


# ---- published files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mom2.count": np.array([5, 6])}, "the count is"),
        ({"mom2.count": np.array("many")}, "the count is many"),
        ({"mom2.count": np.array(2.5)}, "the count is 2.5"),
        ({"mom2.count": np.array(np.inf)}, "the count is inf"),
        ({"mom2.mom2": np.ones((48, 48), dtype=complex)}, "bytes, more than|type complex"),
        ({"mom2.mom2": np.ones((48, 48), dtype=int)}, "type int64"),
        ({"mom2.mom2": np.ones(48 * 48, dtype=np.float32)}, r"shape \[2304\]"),
        ({"mom2.mom2": -np.eye(48)}, "holds no second moment"),
    ],
)
def test_imports_that_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = npz(tmp_path / "moment.npz", **change)
    with pytest.raises(DataFileError, match=words) as caught:
        import_second_moment(path, base(), layers()[1])
    assert_sentence(str(caught.value), path)


@pytest.mark.parametrize("shape", [(10**6, 10**6), (48, 10**9), (2**40,)])
@pytest.mark.parametrize("stored", [100, 10**7])
def test_sizes_that_an_import_declares_take_no_memory(
    shape: tuple[int, ...], stored: int, tmp_path: Path
) -> None:
    """Neither the shape in an array's header nor what a small archive would unpack to."""
    path = npz(tmp_path / "moment.npz")
    with zipfile.ZipFile(path) as archive:
        count = archive.read("mom2.count.npy")
    text = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode() + b"\n"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mom2.count.npy", count)
        archive.writestr("mom2.mom2.npy", header + bytes(stored))
    module = layers()[1]
    tracemalloc.start()
    with pytest.raises(DataFileError, match=str(path)):
        import_second_moment(path, base(), module)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000
