"""Adapters of llama.cpp, read back with its own package."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import edit_kinds
import pytest
import torch
from support import tiny_base
from torch import Tensor

from kedit_lightning import BaseModel
from kedit_lightning.edits import LowRankEdit
from kedit_lightning.edits.gguf_adapter import paired, save_gguf_adapter
from kedit_lightning.edits.projections import find_module, projection_shape
from kedit_lightning.errors import MissingExtraError, UnsupportedUseError
from kedit_lightning.runs.model_export import check_export


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields and tensors of a file, as the package of llama.cpp reads them."""
    gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {
        tensor.name: torch.tensor(tensor.data).reshape(*(int(n) for n in reversed(tensor.shape)))
        for tensor in reader.tensors
    }


def edit_of(base: BaseModel, names: list[str]) -> LowRankEdit:
    """Random factors of ranks 1, 2, …"""
    torch.manual_seed(0)
    factors = {}
    for rank, name in enumerate(names, 1):
        d_in, d_out = projection_shape(find_module(base.model, name))
        factors[name] = (torch.randn(rank, d_in).double(), torch.randn(d_out, rank).double())
    return LowRankEdit(base, factors)


def test_a_file_holds_the_changes_under_the_names_of_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    base = tiny_base("llama")
    modules = {
        "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
        "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
        "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
        "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    }
    edit = edit_of(base, list(modules))
    fields, tensors = read(save_gguf_adapter(base, [edit], tmp_path / "new" / "adapter.gguf"))
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert len(tensors) == 2 * len(modules)
    heads = {
        "q_proj": base.model.config.num_attention_heads,
        "k_proj": base.model.config.num_key_value_heads,
    }
    for module, name in modules.items():
        a, b = (tensors[f"{name}.weight.lora_{part}"] for part in "ab")
        expected = edit.factors[module].dense.float()
        # llama.cpp adds B A times alpha over the rank; it turns neighbouring features together.
        change = b @ a * fields["adapter.lora.alpha"] / len(a)
        if count := heads.get(module.rsplit(".", 1)[1]):
            half = expected.shape[0] // count // 2
            rows = [h * 2 * half + i + p * half
                    for h in range(count) for i in range(half) for p in (0, 1)]  # fmt: skip
            expected = expected[rows]
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)


def test_transposed_projections_are_written_as_llama_cpp_keeps_them(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    base = tiny_base("gpt2")
    edit = edit_kinds.low_rank(base)
    _, tensors = read(save_gguf_adapter(base, [edit], tmp_path / "adapter.gguf"))
    for name, delta in edit.factors.items():
        number = name.split(".")[2]
        a, b = (tensors[f"blk.{number}.ffn_down.weight.lora_{part}"] for part in "ab")
        torch.testing.assert_close(b @ a, delta.dense.float(), rtol=1e-5, atol=1e-5)


def test_dense_changes_are_cut_off_at_a_rank(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    base = tiny_base("llama")
    with pytest.raises(UnsupportedUseError, match="--export_rank"):
        save_gguf_adapter(base, [edit_kinds.dense(base)], tmp_path / "adapter.gguf")
    _, tensors = read(save_gguf_adapter(base, [edit_kinds.dense(base)], tmp_path / "a.gguf", 2))
    assert {min(tensor.shape) for tensor in tensors.values()} == {2}


def test_what_is_not_written_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    path = tmp_path / "adapter.gguf"
    base = tiny_base("gpt_neox")
    fused = edit_of(base, ["gpt_neox.layers.1.attention.query_key_value"])
    with pytest.raises(UnsupportedUseError, match=r"query_key_value.*convert_lora_to_gguf\.py"):
        save_gguf_adapter(base, [fused], path)
    base.model.config.model_type = "blt"
    with pytest.raises(UnsupportedUseError, match=r"type 'blt' has no adapter.*full model"):
        save_gguf_adapter(base, [fused], path)
    assert not path.exists()


def test_without_the_package_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    from toys import Toy

    with pytest.raises(MissingExtraError, match=r"kedit-lightning\[gguf\].*convert_lora_to_gguf"):
        check_export("gguf-lora", Toy.can, "run")


def test_pairs_of_heads() -> None:
    assert paired(torch.arange(4)[:, None], 1).flatten().tolist() == [0, 2, 1, 3]
