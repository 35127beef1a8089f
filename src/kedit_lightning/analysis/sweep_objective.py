"""The score that a sweep improves, by its name in results.json."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from kedit_lightning.benchmark.quality import judged
from kedit_lightning.errors import SweepError
from kedit_lightning.metrics.edit_metrics import COST_BLOCKS
from kedit_lightning.registry import entries
from kedit_lightning.requests import ProbeKind
from kedit_lightning.runs.record_lines import COSTS
from kedit_lightning.runs.results import read_results

Direction: TypeAlias = Literal["maximize", "minimize"]

#: The harmonic mean of rewrite, rephrase and what was known elsewhere; it has the stage itself.
HEADLINE = "score"
_STAGE = re.compile(r"(final|forget|after_\d+)/")


def direction_of(name: str) -> Direction:
    """Which way a score is better, as its metric says.

    >>> (
    ...     direction_of("final/rewrite/tf_all"),
    ...     direction_of("locality/kl"),
    ...     direction_of("edit/bytes"),
    ... )
    ('maximize', 'minimize', 'minimize')

    Raises:
        SweepError: No run can have a score of this name.
    """
    if name == HEADLINE:
        return "maximize"
    stage = _STAGE.match(name)
    parts = name[stage.end() :].split("/") if stage else name.split("/")
    if parts[0] in COST_BLOCKS and len(parts) > 1 and not stage:
        return "minimize"
    metrics = {score.name: score for score in (e.load() for e in entries("metric").values())}
    kinds = get_args(ProbeKind)
    # KIND/METRIC, KIND/GROUP/METRIC, or either with a quantile behind it.
    found = [metrics[part] for part in parts[1:] if part in metrics]
    if parts[0] not in kinds or not found:
        start = name[: stage.end()] if stage else ""
        known = [f"{start}{kind}/{metric}" for kind in kinds for metric in metrics]
        raise SweepError(
            f"no run has a score named '{name}'{_meant(name, [*known, HEADLINE])}; an objective is "
            "KIND/METRIC with final/ before it for the end of a sequence, as in results.json "
            "(`kedit metrics` lists the names), or 'score' for the harmonic mean of rewrite, "
            "rephrase and locality"
        )
    return (
        "maximize" if found[0].higher_is_better and not name.startswith("forget/") else "minimize"
    )


def partial_value(name: str, means: Mapping[str, float]) -> float | None:
    """The score of what has been scored so far; ``None`` if nothing of it has."""
    value = judged(means)["score"] if name == HEADLINE else means.get(name)
    return None if value is None or math.isnan(value) else value


def value_of_run(name: str, folder: Path) -> float:
    """The score of a finished run.

    Raises:
        SweepError: The run has no such score, or it is undefined.
    """
    means = _means(read_results(folder))
    value = judged(means)["score"] if name == HEADLINE else means.get(name)
    if value is None:
        near = _meant(name, list(means))
        raise SweepError(f"the run has no score '{name}'{near}; name another objective")
    if math.isnan(value):
        raise SweepError(f"the score '{name}' of the run is undefined: no case has a value of it")
    return value


def _means(results: Mapping[str, Any]) -> dict[str, float]:
    means = {key: entry["mean"] for key, entry in results["scores"].items()}
    for block in COSTS:
        means |= {f"{block}/{key}": entry["mean"] for key, entry in results[block].items()}
    return means


def _meant(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 3, 0.6)
    return f" (was {' or '.join(close)} meant?)" if close else ""


def check_direction(value: object, name: str) -> Direction:
    """A direction that was given, or that of the metric.

    Raises:
        SweepError: It is none, or there is no score of this name.
    """
    own = direction_of(name)
    if value is None:
        return own
    if value not in get_args(Direction):
        raise SweepError(
            f"direction must be one of {', '.join(get_args(Direction))}, got {value!r}"
        )
    return value  # type: ignore[return-value]
