"""Headline scores of a run: efficacy, generalisation, locality, and their harmonic mean."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import harmonic_mean

#: Headline scores, each the first of its result keys that a run has, under either scoring.
JUDGED_BY: dict[str, tuple[str, ...]] = {
    "rewrite": ("rewrite/tf_all", "rewrite_acc"),
    "rephrase": ("rephrase/tf_all", "rephrase_acc"),
    "known": ("locality/known",),
    "kept": ("locality/keep_top1", "locality"),
}


def judged(scores: Mapping[str, float]) -> dict[str, float | None]:
    """The headline scores of means by result key, and their harmonic mean as ``score``.

    The mean is over rewrite, rephrase and known (kept where nothing was known), as far as the data
    has them; it is that of ROME's score over efficacy, paraphrase and neighbourhood.

    >>> round(judged({"rewrite/tf_all": 1.0, "locality/keep_top1": 0.5})["score"], 3)
    0.667
    """
    # In a sequential run the scores count that remain after its last edit.
    stage = "final/" if any(key.startswith("final/") for key in scores) else ""
    found = {
        name: next((scores[stage + key] for key in keys if stage + key in scores), None)
        for name, keys in JUDGED_BY.items()
    }
    kept = found["kept"] if found["known"] is None else found["known"]
    parts = [value for value in (found["rewrite"], found["rephrase"], kept) if value is not None]
    return {**found, "score": harmonic_mean(parts) if parts else None}
