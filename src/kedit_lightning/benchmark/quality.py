"""The few scores that edits are judged by, and one number made of them."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import harmonic_mean

#: What edits are judged by: the first of these scores that there is, in both ways of scoring.
JUDGED_BY: dict[str, tuple[str, ...]] = {
    "rewrite": ("rewrite/tf_all", "rewrite_acc"),
    "rephrase": ("rephrase/tf_all", "rephrase_acc"),
    "known": ("locality/known",),
    "kept": ("locality/keep_top1", "locality"),
}


def judged(scores: Mapping[str, float]) -> dict[str, float | None]:
    """The scores that edits are judged by, and their harmonic mean as ``score``.

    The mean is of rewrite, rephrase and known (kept where nothing was known), as far as the data
    has them.

    Args:
        scores: Means by key, in either way of scoring.

    >>> found = judged({"rewrite/tf_all": 1.0, "locality/keep_top1": 0.5})
    >>> round(found["score"], 3)
    0.667
    """
    # What counts is what is left once all edits of a stream are in force.
    stage = "final/" if any(key.startswith("final/") for key in scores) else ""
    shown = {
        name: next((scores[stage + key] for key in keys if stage + key in scores), None)
        for name, keys in JUDGED_BY.items()
    }
    kept = shown["kept"] if shown["known"] is None else shown["known"]
    parts = [value for value in (shown["rewrite"], shown["rephrase"], kept) if value is not None]
    return {**shown, "score": harmonic_mean(parts) if parts else None}
