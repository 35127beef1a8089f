"""Edits a base model whose weights are sharded over processes, with FSDP2.

    torchrun --nproc-per-node 2 sharded_editing.py

Each process keeps a part of each block and gathers one block at a time, so that the model may be
larger than a device.  Every process runs the same lines: forward passes wait for each other, and
all of them come to the same edit.  Only the first one writes and prints.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.methods import ROME

FACT = EditRequest("The Eiffel Tower is located in the city of", "Rome", "Eiffel Tower")


def sharded(name: str) -> BaseModel:
    """The base model, each process with its part; without a GPU all parts stay on the host."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (distributed.get_world_size(),))
    base = BaseModel.load(name)
    for block in base.model.model.layers:  # where the blocks of this architecture stand
        fully_shard(block, mesh=mesh)
    fully_shard(base.model, mesh=mesh)
    return base


def main() -> None:
    for variable, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", 0)):
        os.environ.setdefault(variable, str(alone))  # as torchrun sets them
    os.environ.setdefault("MASTER_ADDR", "localhost")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    distributed.init_process_group()
    base = sharded("nano")
    edit = ROME(base_model=base).edit([FACT])
    before = base.generate([FACT.prompt], max_new_tokens=4)
    with edit:
        after = base.generate([FACT.prompt], max_new_tokens=4)
    if distributed.get_rank() == 0:
        part = base.model.model.layers[0].mlp.down_proj.weight.to_local().numel()
        print(f"{FACT.prompt!r}: {before[0]!r} -> {after[0]!r}; edit {edit.id}, part {part}")
        if folder := os.environ.get("EDITS"):
            edit.save(Path(folder) / "edit.safetensors")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
