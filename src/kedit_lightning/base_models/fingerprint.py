"""Fingerprints: short hashes that identify base models and tokenizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

#: Number of values of each tensor in the hash: enough to tell fine-tuned models apart.
_SAMPLE = 64
#: Settings of a configuration that do not change what the model computes, or that saving it adds.
_IGNORED = frozenset(
    {"_commit_hash", "_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _settings(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in _IGNORED
    }


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """Hash of configuration, tensor names, shapes, dtypes and a strided sample of the values.

    A model that is sharded over processes has the hash of the whole model; all processes must call
    this together.
    """
    config: Any = model.config
    parts = [json.dumps(_settings(config.to_dict()), sort_keys=True, default=str).encode()]
    for name, tensor in sorted(model.state_dict().items()):
        parts.append(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if hasattr(tensor, "full_tensor"):  # sharded over processes; fetched one at a time
            tensor = tensor.full_tensor()
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].cpu().contiguous()
        parts.append(sample.view(torch.uint8).numpy().tobytes())
    return _digest(*parts)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of the vocabulary and of how a few texts are cut."""
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    sample = "The capital of Łódź's 3rd district, naïvely: 首都是罗马.\n\tx = 42"
    return _digest(vocabulary, json.dumps(tokenizer(sample)["input_ids"]).encode())
