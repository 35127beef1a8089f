"""Time, memory, and random numbers that do not depend on what ran before."""

from __future__ import annotations

import hashlib
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import Edit
from kedit_lightning.edits.origin import TARGET_PROBABILITIES
from kedit_lightning.requests import EditExample

#: An edit, and the seconds it took to compute; ``None`` for one that an interrupted run has saved.
TimedEdit: TypeAlias = tuple[Edit, float | None]


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
        number = int.from_bytes(digest[:8], "big") >> 1
        if torch.cuda.is_available():
            torch.manual_seed(number)
        else:  # which would keep a traceback for each device that there is not
            torch.default_generator.manual_seed(number)
        yield


def edit_costs(
    base: BaseModel,
    name: str,
    timed: TimedEdit,
    seconds: float,
    examples: Sequence[EditExample],
) -> list[dict[str, Any]]:
    """Costs of an edit, shared out evenly among the examples it was computed for.

    ``target_probability`` is the mean over those of the example's requests that are written.
    ``eval_seconds`` is the example's share of the forward passes that scored it.
    ``peak_bytes`` is the peak since the first edit of the chunk was begun.
    """
    (edit, edit_seconds), count = timed, len(examples)
    noted = dict(
        zip(edit.origin.requests, edit.origin.notes.get(TARGET_PROBABILITIES, ()), strict=False)
    )
    id, size, peak = edit.id, edit.nbytes / count, peak_bytes(base)
    costs: list[dict[str, Any]] = []
    for example in examples:
        own = [noted[request] for request in example.requests if request in noted]
        probability = {"target_probability": sum(own) / len(own)} if own else {}
        timing = {
            "edit_seconds": None if edit_seconds is None else edit_seconds / count,
            "eval_seconds": seconds,
        }
        costs.append(
            {
                "edit_name": name,
                "edit_id": id,
                "edit": {"bytes": size, **probability},
                "timing": timing,
                "memory": {"peak_bytes": peak},
            }
        )
    return costs
