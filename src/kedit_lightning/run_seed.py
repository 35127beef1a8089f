"""The seed of a run."""

from __future__ import annotations

import os


def run_seed() -> int:
    """What ``seed_everything`` was last called with, or else 0.

    Methods, data and intervals take it unless they are given a seed of their own.
    """
    return int(os.environ.get("PL_GLOBAL_SEED") or 0)
