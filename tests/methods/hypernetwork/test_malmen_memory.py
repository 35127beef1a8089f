"""What MALMEN and RLEdit hold in memory: rows that wait in a file, minibatches, stored edits."""

from __future__ import annotations

import gc
import math
import tempfile
import tracemalloc

import pytest
import torch
from episode_support import EXAMPLES, batch_gradient
from hypernetwork_support import rows_of
from malmen_support import FEW, MANY, WIDTHS, rows, solved, stirred, stirred_rledit
from support import REQUESTS, tiny_base

from kedit_lightning import EditBatch
from kedit_lightning.edits import DenseEdit, LowRankEdit
from kedit_lightning.errors import NonFiniteError, TemporaryFileError
from kedit_lightning.methods.hypernetwork.shared import parameter_shift, tensor_file
from kedit_lightning.methods.hypernetwork.shared.normal_equations import (
    NormalEquations,
    Sizes,
    smaller_dense,
)
from kedit_lightning.methods.hypernetwork.shared.parameter_shift import minibatches
from kedit_lightning.methods.hypernetwork.shared.tensor_file import TensorFile


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """Nothing waits in memory; gives the folder of temporary files."""
    monkeypatch.setattr(tensor_file, "IN_MEMORY", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# ---- the file


@pytest.mark.parametrize("limit", [1, 2**20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_come_back_bit_for_bit_in_any_order(monkeypatch, limit, dtype):
    monkeypatch.setattr(tensor_file, "IN_MEMORY", limit)
    first = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    first[0, 0] = math.nan
    tensors = [first, first.T, first[:0], first[1:, 2:5]]
    with TensorFile() as file:
        kept = [file.put(tensor) for tensor in tensors[:2]]
        again = file.get(kept[0])
        kept += [file.put(tensor) for tensor in tensors[2:]]
        found = [file.get(own) for own in reversed(kept)][::-1]
    for wanted, own in zip([first, *tensors], [again, *found], strict=True):
        assert (own.dtype, own.device, own.shape) == (dtype, wanted.device, wanted.shape)
        assert torch.equal(own.nan_to_num(3.0), wanted.nan_to_num(3.0))


def test_what_is_beyond_the_limit_is_not_in_memory(monkeypatch):
    monkeypatch.setattr(tensor_file, "IN_MEMORY", 2**20)
    held = []
    with TensorFile() as file:
        tracemalloc.start()
        for _ in range(8):
            file.put(torch.ones(2**17))  # half a megabyte
            held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert held[0] > 2**19
    assert max(held) < 2**21
    assert held[-1] < 2**17


def test_a_folder_without_space_is_an_error_that_says_what_to_do(on_disk, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(on_disk / "absent"))
    with pytest.raises(TemporaryFileError, match="TMPDIR"):
        stirred(tiny_base("llama")).edit(REQUESTS)


# ---- the equations


@pytest.mark.parametrize("count", [FEW, MANY])
def test_rows_on_disk_give_the_same_shift_bit_for_bit(monkeypatch, count):
    shifts = []
    for limit in (1, 2**30):
        monkeypatch.setattr(tensor_file, "IN_MEMORY", limit)
        shifts.append(solved(*rows(count), 0.7, 5))
    assert torch.equal(shifts[0].unknown, shifts[1].unknown)
    assert torch.equal(shifts[0].factor, shifts[1].factor)
    assert torch.equal(shifts[0].matrix, shifts[1].matrix)


def test_no_row_stays_behind_as_a_tensor():
    width = 41
    with TensorFile() as file:
        equations = NormalEquations(width, width, file)
        for count in (3, 60):
            equations.add(torch.ones(count, width), torch.ones(count, width))
        gc.collect()
        left = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape[-1:] == (width,)]
        assert left == []


@pytest.mark.parametrize("count", [FEW, MANY])
def test_solving_twice_gives_the_same_of_the_size_that_was_announced(count):
    with TensorFile() as file:
        equations = NormalEquations(*WIDTHS, file)
        equations.add(*rows(count))
        first, second = (equations.solve(torch.tensor(0.7).double()) for _ in range(2))
        assert first.sizes == second.sizes == equations.sizes
    assert torch.equal(first.matrix, second.matrix)
    assert math.isinf(first.sizes.low_rank) is (first.keys is None)


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("strength", [math.nan, math.inf, -1e3])
def test_a_ridge_that_is_no_size_gives_nan(count, strength):
    assert bool(solved(*rows(count), strength).matrix.isnan().all())


# ---- minibatches


def test_rows_of_like_length_run_as_many_at_once_as_are_asked_for():
    assert list(minibatches([9] * 7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(minibatches([8, 9, 10, 12], 4)) == [slice(0, 4)]
    assert list(minibatches([], 4)) == []


def test_a_long_row_pads_few_others():
    lengths = [10] * 40 + [200] + [10] * 40
    found = [lengths[some] for some in minibatches(lengths, 32)]
    assert [length for own in found for length in own] == lengths
    most = 1.5 * 32 * sum(lengths) / len(lengths)
    assert all(len(own) * max(own) <= most for own in found)
    assert [len(own) for own in found] == [32, 8, 2, 32, 7]


def test_no_minibatch_of_an_edit_is_longer_than_it_should_be(monkeypatch):
    base = tiny_base("llama")
    method = stirred(base, at_once=4)
    long = REQUESTS[1]
    long = type(long)(" ".join([long.prompt] * 6), long.target_new)
    asked = [*REQUESTS, long, *REQUESTS]
    wanted = method.edit(asked).deltas()
    seen, capture = [], parameter_shift.capture_factors

    def watch(base, rows, *others):
        seen.append(tuple(rows.attention_mask.shape))
        return capture(base, rows, *others)

    monkeypatch.setattr(parameter_shift, "capture_factors", watch)
    found = method.edit(asked).deltas()
    assert all(torch.equal(own, wanted[name]) for name, own in found.items())
    assert sum(count for count, _ in seen) == len(asked)
    longest = max(tokens for _, tokens in seen)
    assert [count < 4 for count, tokens in seen if tokens == longest] == [True]
    lengths = rows_of(base, asked).attention_mask.sum(-1)
    assert all(count * tokens <= 1.5 * 4 * lengths.double().mean() for count, tokens in seen)


# ---- edits


def test_an_edit_is_stored_as_what_is_smaller():
    few, equal, more, many = (Sizes.of(32, 48, n) for n in (19, 19.2, 20, None))
    assert [smaller_dense([own]) for own in (few, equal, more, many)] == [False, False, True, True]
    wide = Sizes.of(1000, 1000, 1)
    assert not smaller_dense([more, wide])
    assert smaller_dense([many, wide])  # one projection has no thin factors at all


@pytest.mark.parametrize(("times", "kind"), [(1, LowRankEdit), (8, DenseEdit)])
def test_few_keys_are_stored_thin_and_more_than_a_matrix_holds_dense(times, kind):
    base = tiny_base("llama")
    method = stirred(base)  # down projections, 48 to 32
    asked = REQUESTS * times
    edit = method.edit(asked)
    assert type(edit) is kind
    with torch.no_grad():
        parts = list(parameter_shift.capture_parts(base, method.network, asked, 100))
        for name in method.network.shapes:
            keys = torch.cat([part[name].inputs for part in parts])
            assert len(keys) <= 48  # so the solve is that for few rows
            gradients = torch.cat([part[name].gradients for part in parts])
            gram = keys.T @ keys + method.network.ridge(name) * torch.eye(48).double()
            shift = torch.linalg.solve(gram, keys.T @ method.network.values(name, keys, gradients))
            assert torch.allclose(edit.deltas()[f"{name}.weight"], shift.T, atol=1e-10)
    held = sum(tensor.numel() for tensor in edit.state()[0].values())
    assert held <= sum(d_in * d_out for d_in, d_out in method.network.shapes.values())


def test_a_chunk_of_a_trajectory_is_stored_as_what_is_smaller():
    base = tiny_base("llama")
    for tokens, kind in (("answer", LowRankEdit), ("all", DenseEdit)):
        settings = {"tokens": tokens, "projections": "down", "n_edits": 3}
        method = stirred_rledit(base, **settings, steps_per_trajectory=2)
        stacks = [list(base.edits) for _ in method.batch_gradients(EditBatch(EXAMPLES))]
        assert [[type(edit) for edit in stack] for stack in stacks] == [[], [kind]]


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_an_edit_whose_rows_waited_on_disk_is_the_same_bit_for_bit(on_disk, monkeypatch, tokens):
    base = tiny_base("llama")
    method = stirred(base, tokens=tokens, projections="all")
    found = method.edit(REQUESTS).deltas()
    monkeypatch.setattr(tensor_file, "IN_MEMORY", 2**30)
    wanted = method.edit(REQUESTS).deltas()
    assert all(torch.equal(own, wanted[name]) for name, own in found.items())


@pytest.mark.parametrize("what", ["edit", "trajectory", "error in a capture", "error in a solve"])
def test_no_file_is_left_after_an_edit_or_an_error(on_disk, monkeypatch, what):
    method = stirred(tiny_base("llama"), at_once=1)
    opened = []

    class Watched(tempfile.SpooledTemporaryFile):
        def __init__(self, **options):
            super().__init__(**options)
            opened.append(self)

    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", Watched)
    capture = parameter_shift.capture_factors

    def fail(base, rows, *others):
        if opened and opened[-1].tell():  # rows wait in it
            raise ZeroDivisionError
        return capture(base, rows, *others)

    if what == "edit":
        method.edit(REQUESTS)
    elif what == "trajectory":
        batch_gradient(stirred_rledit(tiny_base("llama")), EditBatch(EXAMPLES))
    elif what == "error in a capture":
        monkeypatch.setattr(parameter_shift, "capture_factors", fail)
        with pytest.raises(ZeroDivisionError):
            method.edit(REQUESTS)
    else:
        method.network.log_ridges.data[1] = math.nan
        with pytest.raises(NonFiniteError):
            method.edit(REQUESTS)
    assert opened
    assert all(file.closed for file in opened)
    assert list(on_disk.iterdir()) == []
