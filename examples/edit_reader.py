"""Reads a saved edit with nothing but safetensors and torch, for tools without this package.

    python edit_reader.py edit.safetensors

The file is plain safetensors. Its header is JSON in the metadata, or, where it is long, in a tensor
of bytes.  A low-rank edit has factors ``A`` ``[rank, d_in]`` and ``B`` ``[d_out, rank]`` for each
module, a dense one has ``delta`` ``[d_out, d_in]``.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch
from safetensors import safe_open


def read(path: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Header and tensors of a saved edit, once its content is found to be what its id says."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kedit"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "beside" in header:
        header = json.loads(bytes(tensors.pop(header["beside"]).tolist()))
    plain = {name: header[name] for name in ("kind", "values", "origin")}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    if digest.hexdigest()[:16] != header["id"]:
        raise ValueError(f"{path} is damaged: its content is not that of edit {header['id']}")
    return header, tensors


def changes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The change of each module's weight. Shape ``[d_out, d_in]`` each."""
    found = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "A":
            found[module] = tensors[f"{module}.B"] @ tensor
        elif part == "delta":
            found[module] = tensor
    return found


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(__doc__)
    for given in sys.argv[1:]:
        header, tensors = read(given)
        for request in header["origin"]["requests"]:
            print(f"{header['kind']}: {request['prompt']} -> {request['target_new']}")
        for module, change in changes(tensors).items():
            print(f"{module}: {tuple(change.shape)}, norm {change.norm():.3f}")
