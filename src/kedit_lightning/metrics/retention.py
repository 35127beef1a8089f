"""What a stream of edits keeps of what it has written: matrix, age curve, collapse point.

A fact has a *place* in the stream, from 1 on. At a checkpoint ``c`` the first ``c`` facts are asked
again; the *age* of a fact there is the number of facts written after its own edit. Facts fall into
*cohorts*, those written between one checkpoint and the next, and ages into bins with the same
bounds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import harmonic_mean
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.metrics.functional.bootstrap import bootstrap_interval, share_interval
from kedit_lightning.metrics.scores.case_mean import CaseMean, Cases

#: Metrics with their cases, by result key.
Gathered: TypeAlias = Mapping[str, tuple[CaseMean, Cases]]

#: Scores whose retention is told.
FOLLOWED = ("tf_all", "gen_em", "known", "keep_top1", "kl")
#: Parts of the composite score of a stream, each the first that a run has.
PARTS = (
    ("rewrite/gen_em", "rewrite/tf_all"),
    ("rephrase/gen_em", "rephrase/tf_all"),
    ("locality/known", "locality/keep_top1"),
)
#: A stream has collapsed where its composite score is below this share of what it was.
COLLAPSE_SHARE = 0.6
#: Its composite score is compared with that after so many facts, or a tenth of a shorter stream.
COLLAPSE_REFERENCE = 100
#: The first and the last facts of a stream that are compared at its end.
ENDS = 100

_LATER = re.compile(r"(final|after_(\d+))/(.+)")


class Spread(NamedTuple):
    """A score over the orders of a stream: mean, sample standard deviation and bounds."""

    mean: float
    sd: float
    low: float
    high: float
    values: list[float]


def written_at(place: int, chunk_size: int, facts: int) -> int:
    """How many facts stand on the stack right after the edit of the fact at a place.

    >>> [written_at(place, 2, 5) for place in (1, 2, 3, 5)]
    [2, 2, 4, 5]
    """
    return min(-(-place // chunk_size) * chunk_size, facts)


def retention(gathered: Gathered, places: Mapping[int, int], chunk_size: int) -> dict[str, Any]:
    """What a stream keeps, as plain values; empty without two checkpoints at which it was asked.

    Args:
        gathered: Metrics with their cases.
        places: Place of each case in the stream, from 1 on, by its id.
        chunk_size: Facts written by one edit.
    """
    facts = len(places)
    stages = _stages(gathered, facts)
    checkpoints = sorted(stages)
    scores: dict[str, Any] = {}
    for key in sorted({key for keys in stages.values() for key in keys}):
        if key.count("/") == 1 and key.rpartition("/")[2] in FOLLOWED:
            scores[key] = _followed(gathered, stages, key, places, chunk_size)
    if len(stages) < 2 or not scores:
        return {}
    composites = [_composite(gathered, stages[checkpoint]) for checkpoint in checkpoints]
    return {
        "checkpoints": checkpoints,
        "scores": scores,
        "composite": composites,
        "collapse": collapse_point(checkpoints, composites),
    }


def collapse_point(
    checkpoints: Sequence[int], composites: Sequence[float | None]
) -> dict[str, float | None]:
    """The first checkpoint at which a composite score is below 60 % of what it was.

    What it was is its value at the first checkpoint of at least 100 facts, or of a tenth of the
    last one where that is less. ``at`` is ``None`` where the stream has not collapsed.

    >>> collapse_point([10, 20, 50, 100], [0.8, 0.8, 0.4, 0.1])["at"]
    50
    """
    known = [(at, value) for at, value in zip(checkpoints, composites, strict=True)
             if value is not None]  # fmt: skip
    least = min(COLLAPSE_REFERENCE, -(-max(checkpoints, default=0) // 10))
    later = [(at, value) for at, value in known if at >= least]
    if not later:
        return {"at": None, "reference_at": None, "bound": None}
    reference_at, reference = later[0]
    bound = COLLAPSE_SHARE * reference
    fallen = next((at for at, value in later if value < bound), None)
    return {"at": fallen, "reference_at": reference_at, "bound": bound}


def _stages(gathered: Gathered, facts: int) -> dict[int, dict[str, str]]:
    """Result keys by checkpoint: the key without its stage, and the whole key."""
    stages: dict[int, dict[str, str]] = {}
    for whole in gathered:
        if found := _LATER.fullmatch(whole):
            checkpoint = facts if found[1] == "final" else int(found[2])
            stages.setdefault(checkpoint, {})[found[3]] = whole
    return stages


def _composite(gathered: Gathered, keys: Mapping[str, str]) -> float | None:
    """Harmonic mean of what was written, in other words too, and of what was to stay."""
    found = (next((keys[name] for name in names if name in keys), None) for names in PARTS)
    means = [gathered[key][1].values.mean().item() for key in found if key is not None]
    return harmonic_mean(means) if means else None


def _followed(
    gathered: Gathered,
    stages: Mapping[int, Mapping[str, str]],
    key: str,
    places: Mapping[int, int],
    chunk_size: int,
) -> dict[str, Any]:
    """Matrix, age curve and ends of one score."""
    facts, checkpoints = len(places), sorted(stages)
    later = {at: gathered[keys[key]] for at, keys in stages.items() if key in keys}
    asked = {at: cases for at, (_, cases) in later.items()}
    at_once = gathered[key][1] if key in gathered else None
    rows: list[tuple[int, float, int]] = []  # age, value, cluster
    if at_once is not None:
        rows += [(0, value, cluster) for _, value, cluster in _rows(at_once)]
    for at, cases in asked.items():
        for id, value, cluster in _rows(cases):
            age = at - written_at(places[id], chunk_size, facts)
            if age or at_once is None:  # else it was asked on the same stack before
                rows.append((age, value, cluster))
    is_share = next(metric.is_share for metric, _ in later.values())
    found = {
        "matrix": [_by_cohort(asked.get(at), places, checkpoints) for at in checkpoints],
        "immediate": _by_cohort(at_once, places, checkpoints),
        "age": _age_curve(rows, checkpoints, is_share),
    }
    if facts in asked and facts > 1:
        found["ends"] = _ends(asked[facts], places, facts)
    return found


def _rows(cases: Cases) -> Iterator[tuple[int, float, int]]:
    """Id, value and cluster of each case."""
    columns = cases.ids.tolist(), cases.values.tolist(), cases.clusters.tolist()
    return zip(*columns, strict=True)


def _by_cohort(
    cases: Cases | None, places: Mapping[int, int], checkpoints: Sequence[int]
) -> list[float | None]:
    """Mean of each cohort, ``None`` where none of it was asked."""
    if cases is None:
        return [None] * len(checkpoints)
    bounds = torch.tensor(checkpoints)
    at = torch.bucketize(torch.tensor([places[id] for id in cases.ids.tolist()]), bounds)
    return [_mean(cases.values[at == index]) for index in range(len(checkpoints))]


def _age_curve(
    rows: Sequence[tuple[int, float, int]], checkpoints: Sequence[int], is_share: bool
) -> list[dict[str, float]]:
    """Mean by age, with the interval over subjects: one bin for age 0, then up to checkpoints."""
    ages, values, clusters = zip(*rows, strict=True)
    bounds, known = torch.tensor([0, *checkpoints]), torch.tensor(values, dtype=torch.float64)
    bins, ids = torch.bucketize(torch.tensor(ages), bounds), torch.tensor(clusters)
    curve = []
    for index, last in enumerate(bounds.tolist()):
        if not len(inside := (bins == index).nonzero()[:, 0]):
            continue
        interval = share_interval if is_share else bootstrap_interval
        low, high = interval(known[inside], ids[inside], resamples=1000)
        first = 0 if index == 0 else int(bounds[index - 1]) + 1
        mean = known[inside].mean().item()
        curve.append({"from": first, "to": last, "mean": mean, "low": low, "high": high,
                      "n": len(inside)})  # fmt: skip
    return curve


def _ends(cases: Cases, places: Mapping[int, int], facts: int) -> dict[str, float | None]:
    """Means of the first and of the last facts at the end of the stream."""
    size = min(ENDS, facts // 2)
    at = torch.tensor([places[id] for id in cases.ids.tolist()])
    first, last = cases.values[at <= size], cases.values[at > facts - size]
    return {"facts": size, "first": _mean(first), "last": _mean(last)}


def _mean(values: Tensor) -> float | None:
    mean = values.mean().item() if len(values) else math.nan
    return None if math.isnan(mean) else mean
