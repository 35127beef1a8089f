"""How many facts a method was measured to hold, read from ``sequence_capacities.yaml``."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import yaml


class SequenceCapacity(NamedTuple):
    """What was left at the end of a sequence.

    Args:
        facts: How many facts were written.
        rewrite: Share of them that hold.
        known: Share of what the model knew about neighbours that is left.
        source: Where ``benchmarks/RESULTS.md`` has it.
    """

    facts: int
    rewrite: float
    known: float
    source: str


@cache
def sequence_capacities() -> dict[str, SequenceCapacity]:
    """Measured capacities by method, of those that had little left."""
    path = files("kedit_lightning.methods.shared") / "sequence_capacities.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {method: SequenceCapacity(**values) for method, values in content.items()}


def warn_of_capacity(method: str, facts: int) -> None:
    """Warn once at the start of a sequence that is as long as one that was measured to go badly.

    Args:
        method: The editing method.
        facts: Facts of the sequence, with those that stand already.
    """
    known = sequence_capacities().get(method)
    if known is not None and facts >= known.facts:
        warnings.warn(
            f"{method} loses much in a sequence of {facts} facts: after {known.facts} facts on the "
            f"packaged model {known.rewrite:.0%} of them held and {known.known:.0%} of what it "
            f"knew about neighbours was left (benchmarks/RESULTS.md, '{known.source}'); watch it "
            "with --canary rollback, or use AlphaEdit, MEMIT or GRACE, which kept more",
            stacklevel=2,
        )
