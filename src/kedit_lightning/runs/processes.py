"""Processes that were started from outside, as torchrun does."""

from __future__ import annotations

import os

from kedit_lightning.errors import UnsupportedUseError

#: Strategies of Lightning that take a module apart.
_SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def processes_here() -> int:
    """How many processes torchrun has started on this machine; one without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _under_torchrun() else 1


def check_processes(world_size: int, strategy: object = None) -> None:
    """Refuse processes of torchrun that a trainer does not use, and strategies that shard.

    Each process of torchrun that is not used would do the whole run.  A strategy that shards would
    take the method's networks apart, and not the base model, which is no part of the method.

    Raises:
        UnsupportedUseError: The trainer has another number of processes, or such a strategy.
    """
    if type(strategy).__name__ in _SHARDING:
        raise UnsupportedUseError(
            f"{type(strategy).__name__} shards what a method has learned, and not the base model; "
            "for a base model larger than a GPU use --model.base_model.device_map auto, or shard "
            "it with FSDP2 in Python (examples/sharded_editing.py)"
        )
    started = int(os.environ.get("WORLD_SIZE", 1)) if _under_torchrun() else world_size
    if started != world_size:
        raise UnsupportedUseError(
            f"torchrun has started {started} processes, and the trainer is set to {world_size}; "
            f"leave out --trainer.devices or set it to {processes_here()}, and --trainer.num_nodes "
            "to the number of machines"
        )


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
