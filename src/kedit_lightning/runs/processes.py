"""Processes that were started from outside, as torchrun does."""

from __future__ import annotations

import os

from kedit_lightning.errors import UnsupportedUseError


def processes_here() -> int:
    """How many processes torchrun has started on this machine; one without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _under_torchrun() else 1


def check_processes(world_size: int) -> None:
    """Refuse processes of torchrun that a trainer does not use: each would do the whole run.

    Raises:
        UnsupportedUseError: The trainer has another number of processes.
    """
    started = int(os.environ.get("WORLD_SIZE", 1)) if _under_torchrun() else world_size
    if started != world_size:
        raise UnsupportedUseError(
            f"torchrun has started {started} processes, and the trainer is set to {world_size}; "
            f"leave out --trainer.devices or set it to {processes_here()}, and --trainer.num_nodes "
            "to the number of machines"
        )


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
