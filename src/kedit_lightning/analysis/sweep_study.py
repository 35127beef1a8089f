"""A sweep's trials in a storage of Optuna, which any number of workers share."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from kedit_lightning.analysis.search_space import SearchSpace
from kedit_lightning.analysis.sweep_outcome import (
    ATTEMPT,
    CONFIG,
    ERROR,
    INTERRUPTED,
    SLOT,
    SURPLUS,
    WORKER,
    Outcome,
    counted,
    is_lost,
    outcome_of,
    sentence_of,
    slot_of,
)
from kedit_lightning.analysis.sweep_storage import (
    Budget,
    opened_study,
    sampler_of,
    sqlite_file,
    storage_errors,
)
from kedit_lightning.errors import SweepError

Report: TypeAlias = Callable[[int, float], None]
#: Runs a trial: its number, settings, and what takes a step with the score so far, to its score
#: and complete config.
Measure: TypeAlias = Callable[[int, dict[str, Any], Report], tuple[float, str]]
_ASKED = "asked"


class SweepStudy:
    """A study of Optuna with a budget that all workers share exactly.

    Args:
        url: The storage, as SQLAlchemy names it, such as ``sqlite:///sweep.db``.
        name: Name of the study.
        direction: ``maximize`` or ``minimize``.
        budget: How it searches.

    Raises:
        SweepError: The storage cannot be used, or the study has another direction.
        MissingExtraError: The driver of the database is absent.
    """

    def __init__(self, url: str, name: str, direction: str, budget: Budget) -> None:
        self.budget, self.direction = budget, direction
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._lock: FileLock | None = None
        file = sqlite_file(url)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            # sqlite locks no rows: two workers could take one waiting trial.
            self._lock = FileLock(f"{file}.lock")
        self._running: int | None = None
        self._fatal: Exception | None = None
        with storage_errors(url):
            self._claim()
            try:
                self.study = opened_study(url, name, direction, budget)
            finally:
                self._release()

    # ---- what is asked

    def check_asked(self, asked: Mapping[str, str]) -> None:
        """Note what is asked of every trial, or compare it with what the study notes.

        Raises:
            SweepError: The study was begun with something else.
        """
        known = self.study.user_attrs.get(_ASKED)
        if known is None:
            self.study.set_user_attr(_ASKED, dict(asked))
            return
        names = sorted({*known, *asked})
        changed = [f"{n}: {known.get(n)} -> {asked.get(n)}" for n in names]
        changed = [
            text for text, n in zip(changed, names, strict=True) if known.get(n) != asked.get(n)
        ]
        if changed:
            raise SweepError(
                f"study '{self.study.study_name}' was begun with other settings: "
                f"{'; '.join(changed[:5])}; restore them, or name another study with --study"
            )

    def outcomes(self) -> list[Outcome]:
        """What became of each slot so far."""
        found = counted(self._trials()).values()
        return [outcome_of(number, trial) for number, trial in enumerate(found)]

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    # ---- the worker

    def work(
        self,
        space: SearchSpace,
        measure: Measure,
        tell: Callable[[Outcome], None],
        wait: Callable[[int], None],
    ) -> None:
        """Run trials until the budget is used up and no other worker runs one.

        Args:
            space: The settings and what they may be.
            measure: Runs a trial: its number and settings to its score and complete config.
            tell: Called with each outcome of this worker.
            wait: Called once with the number of trials that others still run.

        Raises:
            SweepError: The objective cannot be evaluated at all.
            KeyboardInterrupt: The worker was interrupted; its trial waits for the next one.
        """
        told = False
        while True:
            self._claim()
            try:
                self._revive()
                trials = self._trials()
                states = {trial.state for trial in trials}
                free = len(counted(trials)) < self.budget.trials
                if free or TrialState.WAITING in states:
                    self._one(space, measure)
                elif TrialState.RUNNING not in states:
                    return
            finally:
                self._release()
            if self._running is None:  # another worker runs the last ones, and may end
                if not told:
                    wait(sum(trial.state == TrialState.RUNNING for trial in trials))
                told = True
                time.sleep(min(5.0, self.budget.heartbeat / 2))
                continue
            for outcome in self.outcomes():
                if outcome.run == self._running:
                    tell(outcome)
            self._running = None

    def _one(self, space: SearchSpace, measure: Measure) -> None:
        """Run one trial; the claim is given up once its settings are chosen."""

        def objective(trial: Trial) -> float:
            self._running = trial.number
            try:
                if self._is_surplus(trial.number):
                    trial.set_user_attr(SURPLUS, True)
                    raise SweepError("the budget was used up by another worker meanwhile")
                self.study.sampler = sampler_of(self.budget, slot_of(trial))
                chosen = {name: part.chosen(name, trial) for name, part in space.items()}
                trial.set_user_attr(WORKER, f"{socket.gethostname()}:{os.getpid()}")
            except SweepError:
                raise
            except Exception as error:  # of the sampler or the storage, and of no trial
                self._fatal = error
                raise
            finally:
                self._release()
            return self._measured(trial, chosen, measure)

        try:
            self.study.optimize(objective, n_trials=1, catch=(Exception,))
        except (UpdateFinishedTrialError, ValueError):
            # Silent for too long, as on a machine that slept, it was given to another worker.
            if self._running is None or not is_lost(self._trials()[self._running]):
                raise
        if self._fatal is not None:
            raise self._fatal

    def _measured(self, trial: Trial, chosen: dict[str, Any], measure: Measure) -> float:
        def report(step: int, value: float) -> None:
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned(f"at {step}")

        try:
            value, config = measure(trial.number, chosen, report)
        except optuna.TrialPruned:
            raise
        except (KeyboardInterrupt, SystemExit) as error:
            trial.set_user_attr(INTERRUPTED, True)
            raise KeyboardInterrupt from error
        except Exception as error:
            trial.set_user_attr(ERROR, sentence_of(error))
            if isinstance(error, SweepError):  # the settings are not to blame
                self._fatal = error
            raise
        trial.set_user_attr(CONFIG, config)
        return value

    def _is_surplus(self, number: int) -> bool:
        """Whether a trial lies beyond the budget, or repeats one that is repeated already."""
        found = counted(self._trials())
        slots = [slot for slot, trial in found.items() if trial.number == number]
        return not slots or list(found).index(slots[0]) >= self.budget.trials

    def _revive(self) -> None:
        """Mark trials of silent workers as lost, and let lost trials wait to be run again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        for slot, trial in counted(self._trials()).items():
            attempt = int(trial.user_attrs.get(ATTEMPT, 0))
            attempt += INTERRUPTED not in trial.user_attrs
            if is_lost(trial) and attempt <= self.budget.retries:
                self.study.add_trial(
                    create_trial(
                        state=TrialState.WAITING,
                        params=trial.params,
                        distributions=trial.distributions,
                        user_attrs={SLOT: slot, ATTEMPT: attempt},
                    )
                )

    def _claim(self) -> None:
        if self._lock is not None:
            self._lock.acquire()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
