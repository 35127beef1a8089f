"""Which checkpoint the weights of a model come from, whatever precision they are held in.

There are two identities.  The *fingerprint* is that of the weights as they are stored: it differs
between number types and kinds of quantisation, and edits are bound to it.  The *weights'
fingerprint* is that of the checkpoint which they were loaded from, so it is the same in float32,
bfloat16, float16 and quantised; learned networks and key statistics, which are right for all of
these up to rounding, are bound to it.

A model's word for where it comes from is not enough, as its weights may have been changed since: a
sample of the file is compared with the model.  Weights in a plain number type must be those of the
file, rounded; quantised ones must be nearer to them than half their size.  If they are not, or the
file is not at hand, or is no safetensors file, or names its tensors otherwise than the model, then
the weights' fingerprint is the fingerprint itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from kedit_lightning.base_models.spec import resolve
from kedit_lightning.edits.adapter_state import adapters_in_force
from kedit_lightning.edits.projections import find_module, is_transposed
from kedit_lightning.edits.weight_storage import loaded, matrix_of, quantisation
from kedit_lightning.errors import UnsupportedUseError

#: Values of a row that are read, of the first and of the last row of a tensor.
_SAMPLE = 64
#: Quantised matrices that are compared with the file; reading one takes as long as the matrix.
_MATRICES = 4
#: Relative distance within which a quantised sample is that of the file; of 4 bits it is 0.3.
_NEAR = 0.5
#: Settings of a configuration that do not change what the model computes, or that saving it adds.
_IGNORED = frozenset(
    {"_commit_hash", "_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
)


def described(config: Any, *without: str) -> dict[str, Any]:
    """A configuration as plain values, without what does not change what a model computes."""

    def settings(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: settings(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
            if name not in _IGNORED and name not in without
        }

    return settings(config.to_dict())


def packaged_fingerprint(name: str) -> str:
    """The weights' fingerprint of a packaged base model."""
    return _of_folder(resolve(name))


@cache
def _of_folder(folder: str) -> str:
    return _digest(AutoConfig.from_pretrained(folder), dict(_samples(folder, None)))


def weights_fingerprint(model: nn.Module) -> str | None:
    """Hash of configuration and checkpoint of a model; ``None`` where that cannot be told."""
    if adapters_in_force(model):
        return None
    config: Any = model.config
    source = getattr(config, "_name_or_path", "")
    try:
        samples = dict(_samples(source, getattr(config, "_commit_hash", None))) if source else {}
        if samples and _holds(model, samples):
            return _digest(config, samples)
    except (OSError, ValueError, SafetensorError, UnsupportedUseError):
        pass  # a name that is no repository, a file that is no checkpoint, a strange weight
    return None


def _digest(config: Any, samples: Mapping[str, Tensor]) -> str:
    settings = described(config, "quantization_config")
    hashed = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, sample in sorted(samples.items()):
        hashed.update(name.encode() + sample.float().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


def _files(source: str, revision: str | None) -> list[Path]:
    """The files of a checkpoint in a folder, or in the cache of the hub."""
    names = ("model.safetensors.index.json", "model.safetensors")
    if Path(source).is_dir():
        places = [Path(source) / name for name in names]
    else:
        cached = [try_to_load_from_cache(source, name, revision=revision) for name in names]
        places = [Path(path) for path in cached if isinstance(path, str)]
    first = next((place for place in places if place.is_file()), None)
    if first is None or first.suffix != ".json":
        return [] if first is None else [first]
    shards = json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()
    return [first.parent / shard for shard in sorted(set(shards))]


def _samples(source: str, revision: str | None) -> Iterator[tuple[str, Tensor]]:
    """Starts of the first and the last row of every tensor of a checkpoint, ``[2, n]``."""
    for path in _files(source, revision):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                shape = file.get_slice(name).get_shape()
                if shape and 0 not in shape:
                    yield name, _ends(file.get_slice(name), shape[0])


def _ends(rows: Any, count: int) -> Tensor:
    """Starts of the first and the last row of a tensor, or of what can be sliced like one."""
    ends = [torch.as_tensor(rows[i : i + 1]).reshape(-1)[:_SAMPLE] for i in (0, count - 1)]
    return torch.stack(ends).detach().cpu()


def _holds(model: nn.Module, samples: Mapping[str, Tensor]) -> bool:
    """Whether a model has the weights of a checkpoint, up to rounding."""
    quantised: list[tuple[nn.Module, Tensor]] = []
    names = {name for name, _ in model.named_parameters()}
    found = [name for name in samples if name in names]
    for name in found:
        owner, _, own = name.rpartition(".")
        module = find_module(model, owner)
        if own == "weight" and quantisation(module) is not None:
            quantised.append((module, samples[name]))
            continue
        with loaded(module):
            parameter: Any = module.get_parameter(own)
            if hasattr(parameter, "full_tensor"):
                parameter = parameter.full_tensor()
            here = _ends(parameter, len(parameter))
        if not torch.equal(here, samples[name].to(here.dtype)):
            return False
    some = quantised[:: max(1, len(quantised) // _MATRICES)]
    return 2 * len(found) >= len(names) and all(_is_near(*pair) for pair in some)


def _is_near(module: nn.Module, sample: Tensor) -> bool:
    matrix, source = matrix_of(module), getattr(module, "source_cls", None)
    if is_transposed(module) or getattr(source, "__name__", "") == "Conv1D":
        matrix = matrix.T
    here = _ends(matrix, len(matrix)).float()
    return bool((here - sample.float()).norm() < _NEAR * sample.float().norm())
