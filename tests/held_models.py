"""Models as people hold them: offloaded, quantised, wrapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

CPU = torch.device("cpu")


def offloaded_to_memory(model: Any) -> Any:
    """The model with weights that come to their modules for the time of a call."""
    cpu_offload(model, execution_device=CPU)
    return model


def offloaded_to_disk(model: Any, folder: Path) -> Any:
    """The model with all weights on disk."""
    disk_offload(model, folder, execution_device=CPU)
    return model


def spread(model: Any, blocks: str, folder: Path) -> Any:
    """The model as a device map holds it: every other block on disk, the rest in memory."""
    places = {name: "cpu" for name, _ in model.named_children()}
    owner = blocks.rpartition(".")[0]
    places.pop(owner.partition(".")[0])
    places |= {f"{owner}.{n}": "cpu" for n, _ in model.get_submodule(owner).named_children()}
    del places[blocks]
    count = len(model.get_submodule(blocks))
    places |= {f"{blocks}.{i}": "disk" if i % 2 else "cpu" for i in range(count)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
