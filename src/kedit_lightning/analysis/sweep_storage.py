"""The storage of a sweep: a database of Optuna, its lock, its sampler and its pruner."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from kedit_lightning.errors import KEditError, MissingExtraError, SweepError

Pruner: TypeAlias = Literal["median", "halving", "none"]
Sampler: TypeAlias = Literal["tpe", "random"]
#: How long a write to a sqlite file waits for others, in seconds.
_BUSY = 120


@dataclass(frozen=True)
class Budget:
    """How a sweep searches.

    Args:
        trials: How many settings are tried, over all workers and calls.
        seed: Seed of the sampler; each trial draws with it and its own number.
        sampler: ``tpe`` learns from earlier trials, ``random`` does not.
        pruner: ``median`` ends a trial below the median of the others so far, ``halving`` keeps the
            better quarter at each rung of successive halving, ``none`` ends none.
        startup: Trials before the sampler learns and the median prunes.
        heartbeat: Seconds between signs of life; a trial silent for three of them is run again.
        retries: How often a trial whose worker ended is run again.
    """

    trials: int = 20
    seed: int = 0
    sampler: Sampler = "tpe"
    pruner: Pruner = "median"
    startup: int = 5
    heartbeat: int = 20
    retries: int = 2


def sampler_of(budget: Budget, slot: int) -> BaseSampler:
    """The sampler of a slot: workers with one seed would all draw the same settings."""
    seed = int(np.random.SeedSequence((budget.seed, slot)).generate_state(1)[0])
    if budget.sampler == "random":
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # Before 5.0, Optuna calls it an experiment to take running trials into account.
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(
            seed=seed, n_startup_trials=budget.startup, multivariate=False, constant_liar=True
        )


def pruner_of(budget: Budget) -> BasePruner:
    """The pruner that a budget names."""
    if budget.pruner == "median":
        return MedianPruner(n_startup_trials=budget.startup)
    return SuccessiveHalvingPruner() if budget.pruner == "halving" else NopPruner()


def opened_study(url: str, name: str, direction: str, budget: Budget) -> optuna.Study:
    """A study in a storage, begun if it is not there; no other worker may open it meanwhile.

    Raises:
        SweepError: The study has another direction.
    """
    options = {"connect_args": {"timeout": _BUSY}} if sqlite_file(url) else {}
    beat = budget.heartbeat
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats are called so
        storage = RDBStorage(
            url, engine_kwargs=options, heartbeat_interval=beat, grace_period=3 * beat
        )
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction=direction,  # type: ignore[arg-type]
            sampler=sampler_of(budget, 0),
            pruner=pruner_of(budget),
            load_if_exists=True,
        )
    if study.direction.name.lower() != direction:
        raise SweepError(
            f"study '{name}' is to {study.direction.name.lower()} and not to {direction}; name "
            "another study with --study"
        )
    return study


def sqlite_file(url: str) -> Path | None:
    """The file of a storage in sqlite."""
    with suppress(SQLAlchemyError):
        parts = make_url(url)
        if parts.get_backend_name() == "sqlite" and parts.database:
            return Path(parts.database)
    return None


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Inside, what a database says about itself becomes an error of ours, without its password."""
    try:
        yield
    except KEditError:
        raise
    except ImportError as error:
        raise MissingExtraError(
            f"the driver of {_shown(url)} is not installed ({error.__cause__ or error}); for "
            "PostgreSQL: pip install psycopg2-binary"
        ) from error
    except (SQLAlchemyError, StorageInternalError, RuntimeError, ValueError) as error:
        first = str(error.__cause__ or error).strip().splitlines()[0]
        raise SweepError(
            f"the storage {_shown(url)} cannot be used ({first}); name a file such as "
            "sqlite:///sweep.db, or a database that this machine reaches"
        ) from error


def _shown(url: str) -> str:
    """The name of a storage without its password."""
    with suppress(SQLAlchemyError):
        return make_url(url).render_as_string(hide_password=True)
    return url
