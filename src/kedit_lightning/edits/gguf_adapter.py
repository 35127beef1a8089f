"""Edits of weights as a LoRA adapter of llama.cpp, in one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from kedit_lightning.edits.edit import Edit, EditableModel
from kedit_lightning.edits.low_rank import LowRankDelta
from kedit_lightning.edits.materialisation import OneOrSeveral
from kedit_lightning.edits.rank_truncation import joined_factors, of_rank, truncate
from kedit_lightning.errors import MissingExtraError, UnsupportedUseError, article_list

#: llama.cpp's name of an architecture, by the ``model_type`` of transformers.  Of these its
#: converter keeps each projection as it is, but for what the two tables below say.
ARCHITECTURES = {
    "cohere": "command-r",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
#: Where both halves of a head that rotary positions turn are kept as pairs of neighbours.
_PAIRED = ("granite", "llama", "mistral", "smollm3")
#: Projections whose rows are sorted in a way of their own, which is not done here.
_SORTED = {"gpt_neox": ("attention.query_key_value",)}
_OTHERWISE = (
    "save it with --export adapter and convert that with llama.cpp's convert_lora_to_gguf.py, or "
    "export the full model"
)


def gguf_library() -> Any:
    """The package ``gguf``, which writes such files.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            "adapters of llama.cpp are written by the package gguf, which is not installed; run "
            "pip install 'kedit-lightning[gguf]', or save the edits with --export adapter and "
            "convert that with llama.cpp's convert_lora_to_gguf.py"
        ) from error
    return gguf


def paired(b: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order, for each head on its own.

    transformers turns feature ``i`` together with feature ``i + d/2`` of a head; llama.cpp keeps
    them beside each other.

    >>> import torch
    >>> paired(torch.arange(8)[:, None], heads=2).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]

    Args:
        b: The output factor. Shape ``[heads · d, rank]``.
        heads: Number of heads.
    """
    pairs: Tensor = b.unflatten(0, (heads, 2, -1))
    return pairs.transpose(1, 2).flatten(0, 2)


def save_gguf_adapter(
    base: EditableModel, edits: OneOrSeveral[Edit], path: str | Path, rank: int | None = None
) -> Path:
    """Write edits as a LoRA adapter for ``llama-cli --lora`` and for Ollama's ``ADAPTER``.

    The file holds what llama.cpp's own converter makes of :func:`save_adapter`'s folder, tensor by
    tensor; unlike it, it serves models with transposed weights (GPT-2) as well.

    Args:
        base: The base model.
        edits: The edits, or one; they need not be applied.
        path: The file.
        rank: The largest rank, as of :func:`save_adapter`.

    Raises:
        UnsupportedUseError: An edit or the architecture of the model does not fit.
        MissingExtraError: The package ``gguf`` is not installed.
    """
    gguf = gguf_library()
    totals = joined_factors(edits if rank is None else [truncate(base, edits, rank).edit])
    config: Any = base.model.config
    kind = str(getattr(config, "model_type", ""))
    if kind not in ARCHITECTURES:
        raise UnsupportedUseError(
            f"a model of type '{kind}' has no adapter of llama.cpp written here (known: "
            f"{article_list(sorted(ARCHITECTURES), 20)}); {_OTHERWISE}"
        )
    names = _tensor_names(gguf, kind, config, totals)
    common = max(total.rank for total in totals.values())
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[kind])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(common))  # so it is added unscaled
    for name, total in totals.items():
        a, b = of_rank(total, common)
        if kind in _PAIRED and (heads := _heads(config, name)):
            b = paired(b, heads)
        for part, tensor in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{names[name]}.{part}", tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _heads(config: Any, module: str) -> int | None:
    """Heads of a query or key projection; ``None`` of others."""
    if module.endswith("q_proj"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if module.endswith("k_proj") else None


def _tensor_names(
    gguf: Any, kind: str, config: Any, totals: dict[str, LowRankDelta]
) -> dict[str, str]:
    """llama.cpp's names of the weights of modules.

    Raises:
        UnsupportedUseError: It has none, or sorts them.
    """
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(numbers[ARCHITECTURES[kind]], config.num_hidden_layers)
    found = {n: known.get_name(f"{n}.weight", try_suffixes=(".weight",)) for n in totals}
    sorted_ones = _SORTED.get(kind, ())
    others = [n for n, name in found.items() if name is None or n.endswith(sorted_ones)]
    if others:
        raise UnsupportedUseError(
            f"{article_list(others, 3)} of this model cannot be written as an adapter of "
            f"llama.cpp here; {_OTHERWISE}"
        )
    return found
