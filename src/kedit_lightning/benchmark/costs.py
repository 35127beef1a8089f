"""Time, memory, and random numbers that do not depend on what ran before."""

from __future__ import annotations

import hashlib
import random
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from kedit_lightning.base_models import BaseModel


class Clock:
    """Seconds since the last lap, with the work of the base model's device done."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self._base.device.type == "cuda":
            torch.cuda.synchronize(self._base.device)
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed


def reset_peak(base: BaseModel) -> None:
    """Start to measure the peak of memory anew, where the device can."""
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)


def peak_bytes(base: BaseModel) -> float:
    """Highest allocation on a CUDA device since the last reset, weights included.

    On the CPU it is the highest resident size of the process so far.
    """
    if base.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(base.device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


@contextmanager
def fixed_randomness(seed: int, purpose: str) -> Iterator[None]:
    """Inside, all global random numbers depend on seed and purpose alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    with isolate_rng():
        random.seed(digest)
        np.random.seed(int.from_bytes(digest[:4], "big"))
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
