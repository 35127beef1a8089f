"""Fingerprints: short hashes that identify base models and tokenizers.

The fingerprint of a model reads a sample of its weights, in milliseconds.  It tells models and
fine-tuned copies apart, but may miss a change of a few values.  The full fingerprint reads all of
them, once through the memory that they take: about half a second a gigabyte on a core.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kedit_lightning.base_models.source_checkpoint import described, weights_fingerprint
from kedit_lightning.edits.adapter_state import adapters_in_force, tensors_in_force
from kedit_lightning.edits.weight_storage import settle_weights, stored_tensors

#: Words of eight bytes summed at a time.
_CHUNK = 1 << 17
_WRAP = 1 << 64
#: Number of values of each tensor in the hash: enough to tell fine-tuned models apart.
_SAMPLE = 64


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _configuration(model: nn.Module) -> bytes:
    settings = described(model.config)
    if adapters := adapters_in_force(model):
        settings["adapters"] = adapters
    return json.dumps(settings, sort_keys=True, default=str).encode()


def _tensors(
    model: nn.Module, state: dict[str, Tensor] | None = None
) -> Iterator[tuple[bytes, Tensor]]:
    """Names with shapes and dtypes, and the whole tensors, one at a time."""
    for name, tensor in stored_tensors(model, state or tensors_in_force(model)):
        label = f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode()
        # Sharded over processes; fetched one at a time.
        yield label, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _on_host(samples: Sequence[Tensor]) -> Sequence[Tensor]:
    """Bytes ``[n]`` each on the CPU, copied at once if they are on one device."""
    if len({sample.device for sample in samples}) != 1 or samples[0].device.type == "cpu":
        return [sample.cpu() for sample in samples]
    whole = torch.cat(list(samples)).cpu()
    ends = [*accumulate(len(sample) for sample in samples)]
    return [whole[end - len(sample) : end] for sample, end in zip(samples, ends, strict=True)]


@torch.no_grad()
def model_fingerprint(model: nn.Module, state: dict[str, Tensor] | None = None) -> str:
    """Hash of configuration, tensor names, shapes, dtypes and a strided sample of the values.

    A model that is sharded over processes has the hash of the whole model; all processes must call
    this together.

    Args:
        model: The model.
        state: Its tensors in force, where they are known.
    """
    names: list[bytes] = []
    samples: list[Tensor] = []
    for name, tensor in _tensors(model, state):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].contiguous()
        names.append(name)
        samples.append(sample.view(torch.uint8))
    parts = [_configuration(model)]
    for name, data in zip(names, _on_host(samples), strict=True):
        parts += [name, data.numpy().tobytes()]
    return _digest(*parts)


def full_fingerprint(model: nn.Module) -> str:
    """Hash of configuration, tensor names, shapes, dtypes and all values, equal on every device.

    All processes of a sharded model must call this together.
    """
    parts = [_configuration(model)]
    for name, tensor in _tensors(model):
        parts += [name, str(checksum(tensor)).encode()]
    return _digest(*parts)


@torch.no_grad()
def checksum(tensor: Tensor) -> tuple[int, int]:
    """Two sums over the bits of a tensor, computed where it is; equal for bit-equal tensors.

    One changed bit always changes the first; the second depends on the places as well.

    Args:
        tensor: Any tensor; of one that is sharded, the shard of this process is summed.

    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
    False
    """
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    words, rest = data[:whole], data[whole:].to(torch.int64)
    # Words must not begin inside a word of the memory that a view shares with others.
    words = (words if words.storage_offset() % 8 == 0 else words.clone()).view(torch.int64)
    chunk = _CHUNK if words.device.type == "cpu" else 32 * _CHUNK
    places = torch.arange(min(chunk, len(words)), device=words.device) * 2 + 1
    plain, placed = int(rest.sum()), int((rest * (torch.arange(len(rest)) + 1).to(rest)).sum())
    for start in range(0, len(words), chunk):
        part = words[start : start + chunk]
        total = int(part.sum())
        plain += total
        placed += int((part * places[: len(part)]).sum()) + 2 * start * total
    # Integers wrap around on every device alike, and here.
    return plain % _WRAP, placed % _WRAP


class _Seen(NamedTuple):
    """What tells whether weights have changed.

    Args:
        fingerprint: Hash of configuration and a sample of them.
        counts: Where they are, and how often torch has changed them.
    """

    fingerprint: str
    counts: tuple[object, ...]


class ModelIdentity:
    """Who a model is now: hashes of its weights as they are, not as they were when it was loaded.

    The fingerprint is read from the weights at each use.  The full one is remembered as long as
    the fingerprint, the places in memory of all tensors and torch's counts of changes are the same.
    They miss a change of a few values in place behind torch's back, as through ``.data``.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        settle_weights(model)
        self._model = model
        self._known: _Seen | None = None
        self._full: tuple[object, str] | None = None
        self._weights: tuple[object, str] | None = None
        self._tokenizer: tuple[object, int, str] | None = None
        #: While :meth:`held`, what was seen of the weights, once they were looked at.
        self._held: list[_Seen] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the weights stay as they are, and are looked at once."""
        before, self._held = self._held, [] if self._held is None else self._held
        try:
            yield
        finally:
            self._held = before

    @property
    def fingerprint(self) -> str:
        """Hash of configuration and a sample of the weights."""
        return self._seen().fingerprint

    def _seen(self) -> _Seen:
        if self._held:
            return self._held[0]
        settle_weights(self._model)
        state = tensors_in_force(self._model)
        counts, known = _counts(state), self._known
        # Reading a sharded model takes all processes, and this one may ask by itself; reading an
        # offloaded one takes as long as moving all of it.
        if known is None or known.counts != counts or not any(map(_is_far, state.values())):
            self._known = known = _Seen(model_fingerprint(self._model, state), counts)
        if self._held is not None:
            self._held.append(known)
        return known

    @property
    def fingerprints(self) -> tuple[str, str]:
        """The fingerprint, and the hash of configuration and all weights."""
        seen = self._seen()
        if self._full is None or self._full[0] != seen:
            self._full = seen, full_fingerprint(self._model)
        return seen.fingerprint, self._full[1]

    @property
    def full_fingerprint(self) -> str:
        """Hash of configuration and all weights."""
        return self.fingerprints[1]

    @property
    def weights_fingerprint(self) -> str:
        """Hash of the checkpoint that the weights come from, equal in every precision.

        See :mod:`~kedit_lightning.base_models.source_checkpoint`.
        """
        known = (self.fingerprint, _counts(self._model.state_dict()))
        if self._weights is None or self._weights[0] != known:
            self._weights = known, weights_fingerprint(self._model) or self.fingerprint
        return self._weights[1]

    def of_tokenizer(self, tokenizer: Any) -> str:
        """Hash of the tokenizer, remembered until tokens are added to it or it is another one."""
        size = len(tokenizer)
        if self._tokenizer is None or self._tokenizer[:2] != (tokenizer, size):
            self._tokenizer = tokenizer, size, tokenizer_fingerprint(tokenizer)
        return self._tokenizer[2]


def _is_far(tensor: Any) -> bool:
    """Whether a tensor is spread over processes or offloaded."""
    return hasattr(tensor, "full_tensor") or getattr(tensor, "is_meta", False)


def _counts(state: Mapping[str, Tensor]) -> tuple[object, ...]:
    """Where each tensor is, and how often torch has changed it since it was made."""
    return tuple(
        (name, _address(tensor), None if tensor.is_inference() else tensor._version)
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    )


def _address(tensor: Tensor) -> tuple[int, ...]:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if is_traceable_wrapper_subclass(local):
        inner, _ = local.__tensor_flatten__()
        return tuple(getattr(local, name).data_ptr() for name in inner)
    return (local.data_ptr(),)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of the vocabulary and of how a few texts are cut."""
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    sample = "The capital of Łódź's 3rd district, naïvely: 首都是罗马.\n\tx = 42"
    return _digest(vocabulary, json.dumps(tokenizer(sample)["input_ids"]).encode())
