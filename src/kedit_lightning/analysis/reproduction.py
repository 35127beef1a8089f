"""Whether two runs of the same settings gave the same numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.runs.record_lines import COSTS, records_in
from kedit_lightning.runs.results import read_results
from kedit_lightning.runs.resumption import differences

#: Hashes of what the last digits of an edit decide.
_IDS = ("edit_id",)
#: Where a value stands in a record: names, and places in lists.
_Place: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class Reproduction:
    """How a repeated run differs from the first one; timing and memory are left out.

    Args:
        readings: Numbers and texts of the records that both runs have.
        rounded: Numbers that differ, but by no more than the tolerance.
        differing: How many readings differ by more, by their name (``probes/after/text``).
        largest: The largest difference of numbers, by the same names; all of it if none is named.
        missing: Records that only one of the two has, as ``id (stage)``.
        scores: Score, its mean in the first run, and in the second, where they differ.
        facts: Clauses about what the runs say of themselves and differs, such as a version.
    """

    readings: int
    rounded: int
    differing: Mapping[str, int]
    largest: Mapping[str, float]
    missing: tuple[str, ...]
    scores: tuple[tuple[str, float, float], ...]
    facts: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether every record and every score is the same, within the tolerance."""
        return not self.differing and not self.missing and not self.scores


def reproduction(first: Path, second: Path, tolerance: float = 0.0) -> Reproduction:
    """Compare the folders of two finished runs, number by number.

    Args:
        first: Folder of the run.
        second: Folder of the run that repeats it.
        tolerance: How far two numbers may be apart, in parts of the larger one, or absolutely
            where both are below 1. Texts, token ids and yes or no must be equal.

    Raises:
        DataFileNotFoundError: One of them holds no finished run.
        ResumeError: A line of their results is damaged.
    """
    runs = [read_results(folder) for folder in (first, second)]
    records = [_by_place(folder) for folder in (first, second)]
    counts, largest, readings, rounded = Counter[str](), {"": 0.0}, 0, 0
    for place in records[0].keys() & records[1].keys():
        leaves = [dict(_leaves(by_place[place])) for by_place in records]
        for path in leaves[0].keys() | leaves[1].keys():
            then, now = (found.get(path) for found in leaves)
            readings += 1
            if type(then) is type(now) and then == now:
                continue
            name = "/".join(part for part in path if isinstance(part, str))
            apart = abs(then - now) if isinstance(then, float) and isinstance(now, float) else None
            if apart is not None:
                largest |= {key: max(largest.get(key, 0.0), apart) for key in ("", name)}
            if _near(then, now, tolerance) or (tolerance and name in _IDS):
                rounded += 1
            else:
                counts[name] += 1
    lone = sorted(records[0].keys() ^ records[1].keys())
    means = [{k: score["mean"] for k, score in run.get("scores", {}).items()} for run in runs]
    changed = [
        (key, *(found.get(key, math.nan) for found in means))
        for key in sorted(means[0].keys() | means[1].keys())
        if not _near(means[0].get(key), means[1].get(key), tolerance)
    ]
    # What a stream keeps is made of the same records as the scores.
    left_out = ("scores", "retention", *COSTS)
    facts = [{k: v for k, v in run.items() if k not in left_out} for run in runs]
    return Reproduction(
        readings,
        rounded,
        counts,
        largest,
        tuple(f"{id} ({stage})" for id, stage in lone),
        tuple(cast("list[tuple[str, float, float]]", changed)),
        tuple(clause for _, clause in differences(facts[0], facts[1])),
    )


def _by_place(folder: Path) -> dict[tuple[str, str], ExampleRecord]:
    return {(record["id"], record["stage"]): record for record in records_in(folder)}


def _leaves(value: Any, path: _Place = ()) -> Iterator[tuple[_Place, Any]]:
    """The single values of a record with their paths, without costs."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if path or name not in COSTS:
                yield from _leaves(inner, (*path, name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _leaves(inner, (*path, place))
    else:
        yield path, value


def _near(then: Any, now: Any, tolerance: float) -> bool:
    if isinstance(then, float) and isinstance(now, float):
        return then == now or abs(then - now) <= tolerance * max(1.0, abs(then), abs(now))
    return bool(then == now)
