"""What became of the trials of a sweep.

The first runs of trials are the *slots* of a budget.  A slot is run again when its worker ends
without a word, or is interrupted; what counts is the first run of a slot that is not lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState

from kedit_lightning.errors import KEditError, one_line

#: Attributes of trials.
SLOT, ATTEMPT, ERROR, SURPLUS = "slot", "attempt", "error", "surplus"
INTERRUPTED, CONFIG, WORKER = "interrupted", "config", "worker"


@dataclass(frozen=True)
class Outcome:
    """What became of a slot.

    Args:
        number: Number of the slot among all, from 0.
        run: Number of the run that counts, and of its folder.
        state: ``complete``, ``pruned``, ``failed``, ``running``, ``waiting`` or ``lost``.
        value: Its score, that so far where it was pruned.
        params: Its settings.
        seconds: How long it took.
        error: Why it failed.
        config: Its complete config.
    """

    number: int
    run: int
    state: str
    value: float | None
    params: Mapping[str, Any]
    seconds: float | None
    error: str = ""
    config: str = ""


def slot_of(trial: FrozenTrial | Trial) -> int:
    """The slot that a trial fills: its own number, or that of the trial it repeats."""
    return int(trial.user_attrs.get(SLOT, trial.number))


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial ended without a result and without an error of its own."""
    return trial.state == TrialState.FAIL and ERROR not in trial.user_attrs


def counted(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    """The trial that counts of each slot: the first that is not lost, or else the last one."""
    found: dict[int, FrozenTrial] = {}
    for trial in sorted(trials, key=lambda one: one.number):
        if SURPLUS in trial.user_attrs:
            continue
        known = found.get(slot_of(trial))
        if known is None or is_lost(known):
            found[slot_of(trial)] = trial
    return dict(sorted(found.items()))


def best_of(outcomes: Sequence[Outcome], direction: str) -> Outcome | None:
    """The complete outcome with the best score, the first of several."""
    complete = [one for one in outcomes if one.state == "complete" and one.value is not None]
    sign = -1 if direction == "maximize" else 1
    return min(complete, key=lambda one: sign * (one.value or 0.0), default=None)


def outcome_of(number: int, trial: FrozenTrial) -> Outcome:
    """What a trial says of the slot that is one of a number."""
    states = {TrialState.FAIL: "failed"}
    state = "lost" if is_lost(trial) else states.get(trial.state, trial.state.name.lower())
    error = trial.user_attrs.get(ERROR, "")
    return Outcome(
        number,
        trial.number,
        state,
        trial.value,
        trial.params,
        None if trial.duration is None else trial.duration.total_seconds(),
        error or ("its worker ended without a word" if state == "lost" else ""),
        trial.user_attrs.get(CONFIG, ""),
    )


def sentence_of(error: Exception) -> str:
    """An error in one line; the class of one that is not ours tells more than its words."""
    text = one_line(error)
    return text if isinstance(error, KEditError) else f"{type(error).__name__}: {text}"
