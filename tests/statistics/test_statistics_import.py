"""Second moments that the code of ROME has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_base

from kedit_lightning import BaseModel
from kedit_lightning.errors import DataFileError, DataFileNotFoundError, UnsupportedUseError
from kedit_lightning.statistics import find_statistics, import_second_moment
from kedit_lightning.statistics.__main__ import main

WIDTH = 128  # of an MLP in the tiny GPT-2
NAME = "transformer.h.2.mlp.c_proj_float32_mom2_100000.npz"


def published(folder: Path, name: str = NAME, width: int = WIDTH, **change: Any) -> Path:
    """A file as ``tally`` with a ``CombinedStat`` writes it."""
    keys = np.random.default_rng(0).normal(size=(500, width)).astype(np.float32)
    arrays = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": len(keys),
        "mom2.mom2": keys.T @ keys,
        "sample_size": 100000,
    }
    np.savez(folder / name, **{key: v for key, v in (arrays | change).items() if v is not None})
    return folder / name


def test_the_sum_becomes_a_mean_of_the_layer_in_the_name(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    path = published(tmp_path)
    import_second_moment(path, base)
    module = base.layout.block(2).down
    found = find_statistics(base, module)
    assert found is not None
    assert found.moment.count == 500
    assert found.moment.error is None
    expected = torch.from_numpy(np.load(path)["mom2.mom2"]).double() / 500
    torch.testing.assert_close(found.moment.mean, expected, rtol=1e-5, atol=1e-6)
    assert NAME in found.note
    assert not found.is_few_sample
    assert find_statistics(base, base.layout.block(1).down) is None
    assert find_statistics(tiny_base("gpt2", torch.float32), module) is None


def test_a_file_of_another_name_with_bare_fields_and_a_cap(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    moment = np.eye(WIDTH, dtype=np.float32) * 6
    np.savez(tmp_path / "mine.npz", mom2=moment, count=np.array(3))
    module = base.layout.block(1).down
    import_second_moment(tmp_path / "mine.npz", base, module)
    found = find_statistics(base, module)
    assert found is not None
    torch.testing.assert_close(found.moment.mean, 2 * torch.eye(WIDTH, dtype=torch.float64))
    capped = "transformer.h.0.mlp.c_proj_float32_mom2_t100_100000.npz"
    import_second_moment(published(tmp_path, capped), base)
    found = find_statistics(base, base.layout.block(0).down)
    assert found is not None
    assert found.provenance.max_tokens == 100


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (NAME, {"width": 64}, r"shape \[64, 64\] .*, and the keys of .* have width 128"),
        (NAME, {"mom2.mom2": None}, "format of the ROME code"),
        (NAME, {"mom2.count": 0}, "count 0"),
        (NAME, {"mom2.mom2": np.triu(np.ones((WIDTH, WIDTH)))}, "not symmetric"),
        (NAME, {"mom2.mom2": np.full((WIDTH, WIDTH), np.nan)}, "not finite"),
        (NAME, {"mom2.mom2": np.array([print], dtype=object)}, "allow_pickle"),
        ("moment.npz", {}, "does not say which module.*--layer"),
        ("transformer.h.9.mlp.c_proj_float32_mom2.npz", {}, "no module 'transformer.h.9"),
        ("transformer.h.1.mlp_float32_mom2.npz", {}, "no Linear or Conv1D"),
    ],
)
def test_what_is_refused(name: str, change: Any, words: str, tmp_path: Path) -> None:
    path = published(tmp_path, name, **change)
    with pytest.raises((DataFileError, UnsupportedUseError), match=words):
        import_second_moment(path, tiny_base("gpt2"))
    assert not list(tmp_path.glob("cache/**/*.safetensors"))


def test_a_layer_that_the_name_contradicts(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    with pytest.raises(UnsupportedUseError, match=r"belong to 'transformer\.h\.2\.mlp\.c_proj'"):
        import_second_moment(published(tmp_path), base, base.layout.block(1).down)


def test_files_that_are_absent_or_of_another_kind(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    with pytest.raises(DataFileNotFoundError, match="no file"):
        import_second_moment(tmp_path / NAME, base)
    (tmp_path / NAME).write_bytes(b"<html>not found</html>")
    with pytest.raises(DataFileError, match="format of the ROME code"):
        import_second_moment(tmp_path / NAME, base)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = published(tmp_path, "moment.npz", width=512)
    main([str(path), "--base_model", "nano", "--dtype", "float64", "--layer", "3"])
    assert "moment.npz is in " in capsys.readouterr().out
    base = BaseModel.load("nano", dtype="float64")
    (kept,) = tmp_path.glob("cache/statistics/*.safetensors")
    assert kept.name.startswith(base.weights_fingerprint)
    with pytest.raises(SystemExit) as stopped:
        main([str(path), "--base_model", "nano"])
    assert stopped.value.code == 2
    assert "error: the name of 'moment.npz'" in capsys.readouterr().err
