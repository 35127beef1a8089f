"""How much memory rows, activations and edits may take at a time."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

#: Most bytes on a CPU: larger batches are no faster there.
CPU_BUDGET = 2 << 30
#: Where Linux says how much memory a container may have.
_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def memory_budget(device: torch.device) -> int:
    """Bytes that may be taken at a time on a device.

    Half of what is free on a CUDA device.  On a CPU a quarter of what the machine or container has,
    whether it is free or not, so that a run that is continued groups its rows as before.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return min(CPU_BUDGET, _machine_memory() // 4)


@cache
def _machine_memory() -> int:
    """Bytes of memory of this machine or container."""
    found = [4 * CPU_BUDGET]  # where the system does not say
    with suppress(AttributeError, OSError, ValueError):
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # "max" without a limit
        found.append(int(_CONTAINER.read_text(encoding="ascii")))
    return min(found)
