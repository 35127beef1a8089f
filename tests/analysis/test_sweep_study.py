"""Trials of a sweep: their settings, their budget, and what becomes of lost ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

optuna = pytest.importorskip("optuna", reason="sweeps need the extra `sweep`")
from optuna.trial import TrialState, create_trial  # noqa: E402

from kedit_lightning.analysis.search_space import Choice, Range, option, read_space  # noqa: E402
from kedit_lightning.analysis.sweep_objective import direction_of, partial_value  # noqa: E402
from kedit_lightning.analysis.sweep_outcome import Outcome, best_of  # noqa: E402
from kedit_lightning.analysis.sweep_storage import Budget  # noqa: E402
from kedit_lightning.analysis.sweep_study import SweepStudy  # noqa: E402
from kedit_lightning.errors import MissingExtraError, SweepError, UnsupportedUseError  # noqa: E402

SPACE = {"x": Range(0.0, 1.0), "n": Range(1, 9, step=2), "layers": Choice(((0,), (1, 2), "all"))}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where there is one: every write of sqlite waits for the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def study(folder: Path, name: str = "s", **budget: Any) -> SweepStudy:
    return SweepStudy(f"sqlite:///{folder / 'sweep.db'}", name, "maximize", Budget(**budget))


def work(sweep: SweepStudy, measure: Any) -> list[Outcome]:
    sweep.work(SPACE, measure, lambda outcome: None, lambda others: None)
    return sweep.outcomes()


def value(number: int, chosen: dict[str, Any], report: Any) -> tuple[float, str]:
    return chosen["x"], f"config {number}"


def test_a_budget_is_used_once(tmp_path: Path) -> None:
    first = work(study(tmp_path, trials=4), value)
    assert [one.state for one in first] == ["complete"] * 4
    assert {type(one.params["n"]) for one in first} == {int}
    assert all(one.params["n"] % 2 for one in first)
    assert best_of(first, "maximize") == max(first, key=lambda one: one.value or 0)
    assert work(study(tmp_path, trials=4), value) == first
    assert len(work(study(tmp_path, trials=6), value)) == 6


def test_draws_follow_from_the_seed_and_the_number(tmp_path: Path) -> None:
    draws = [
        [one.params for one in work(study(tmp_path, str(place), trials=4, seed=seed), value)]
        for place, seed in enumerate([0, 0, 1])
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len({params["x"] for params in draws[0]}) == 4


def test_a_trial_that_fails_says_why_and_the_sweep_goes_on(tmp_path: Path) -> None:
    def measure(number: int, chosen: dict[str, Any], report: Any) -> tuple[float, str]:
        if number == 0:
            raise UnsupportedUseError("lr must be above 0")
        if number == 1:
            raise ZeroDivisionError("division\nby zero")
        return value(number, chosen, report)

    found = work(study(tmp_path, trials=3), measure)
    assert [(one.state, one.error) for one in found] == [
        ("failed", "lr must be above 0"),
        ("failed", "ZeroDivisionError: division by zero"),
        ("complete", ""),
    ]


def test_an_objective_that_no_run_has_ends_the_sweep(tmp_path: Path) -> None:
    def measure(number: int, chosen: dict[str, Any], report: Any) -> tuple[float, str]:
        raise SweepError("the run has no such score")

    with pytest.raises(SweepError, match="no such score"):
        work(study(tmp_path, trials=3), measure)
    assert len(study(tmp_path).outcomes()) == 1


def test_a_sampler_that_fails_ends_the_sweep(tmp_path: Path) -> None:
    sweep = study(tmp_path, trials=3)
    with pytest.raises(ValueError, match="low"):
        sweep.work({"x": Range(2.0, 1.0)}, value, lambda outcome: None, lambda others: None)
    assert len(sweep.outcomes()) == 1


@pytest.mark.parametrize("pruner", ["median", "halving", "none"])
def test_poor_trials_are_pruned(tmp_path: Path, pruner: Any) -> None:
    def measure(number: int, chosen: dict[str, Any], report: Any) -> tuple[float, str]:
        for step in range(1, 9):
            report(step, -float(number))
        return -float(number), ""

    states = [
        one.state for one in work(study(tmp_path, trials=6, startup=2, pruner=pruner), measure)
    ]
    assert states[0] == "complete"
    assert states.count("pruned") == {"median": 4, "halving": 4, "none": 0}[pruner]


def test_an_interrupted_trial_is_run_again(tmp_path: Path) -> None:
    def measure(number: int, chosen: dict[str, Any], report: Any) -> tuple[float, str]:
        if number == 1:
            raise SystemExit(130)
        return value(number, chosen, report)

    sweep = study(tmp_path, trials=3)
    with pytest.raises(KeyboardInterrupt):
        work(sweep, measure)
    lost = sweep.outcomes()[1]
    assert lost.state == "lost"
    found = work(study(tmp_path, trials=3), value)
    assert [(one.number, one.run, one.state) for one in found] == [
        (0, 0, "complete"),
        (1, 2, "complete"),
        (2, 3, "complete"),
    ]
    assert found[1].params == lost.params


def test_a_trial_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    sweep = study(tmp_path, trials=2, retries=2)
    for attempt in range(3):  # what a worker leaves that was killed and found silent
        attrs = {"slot": 0, "attempt": attempt} if attempt else {}
        sweep.study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=attrs))
    found = work(sweep, value)
    assert [(one.number, one.state) for one in found] == [(0, "lost"), (1, "complete")]
    assert "ended without a word" in found[0].error


def test_what_another_worker_took_is_not_run_again(tmp_path: Path) -> None:
    sweep = study(tmp_path, trials=2)
    ran: list[int] = []

    def measure(number: int, chosen: dict[str, Any], report: Any) -> tuple[float, str]:
        ran.append(number)
        return value(number, chosen, report)

    sweep.study.add_trial(create_trial(state=TrialState.FAIL))
    for state in (TrialState.COMPLETE, TrialState.WAITING):  # two workers revived the first one
        sweep.study.add_trial(
            create_trial(
                state=state,
                value=0.5 if state == TrialState.COMPLETE else None,
                user_attrs={"slot": 0, "attempt": 1},
            )
        )
    found = work(sweep, measure)
    assert [(one.number, one.run) for one in found] == [(0, 1), (1, 3)]
    assert ran == [3]


def test_a_study_keeps_to_what_it_was_begun_with(tmp_path: Path) -> None:
    study(tmp_path).check_asked({"model.lr": "0.1"})
    study(tmp_path).check_asked({"model.lr": "0.1"})
    with pytest.raises(SweepError, match=r"model.lr: 0.1 -> 0.2"):
        study(tmp_path).check_asked({"model.lr": "0.2"})
    with pytest.raises(SweepError, match="is to maximize and not to minimize"):
        SweepStudy(f"sqlite:///{tmp_path / 'sweep.db'}", "s", "minimize", Budget())


def test_a_storage_that_cannot_be_used_is_named_without_its_password() -> None:
    with pytest.raises((MissingExtraError, SweepError), match=r"me:\*\*\*@localhost") as error:
        SweepStudy("postgresql://me:secret@localhost:1/db", "s", "maximize", Budget())
    assert "secret" not in str(error.value)
    with pytest.raises(SweepError, match="cannot be used"):
        SweepStudy("no-such-database", "s", "maximize", Budget())


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (None, "needs a space"),
        ({"model.lr": 3}, r"space\.model\.lr needs a range"),
        ({"model.lr": []}, "choices that differ"),
        ({"model.lr": [1, 1]}, "choices that differ"),
        ({"model.lr": [False, 0]}, "choices that differ"),  # equal to a mapping of them
        ({"model.lr": {"low": 1}}, "needs low and high"),
        ({"model.lr": {"low": 1, "high": 2, "lgo": True}}, "it has lgo"),
        ({"model.lr": {"low": 2, "high": 1}}, "must be below high"),
        ({"model.lr": {"low": 0, "high": 1, "log": True}}, "above 0"),
        ({"model.lr": {"low": 1, "high": 9, "log": True, "step": 2}}, "exclude each other"),
        ({"model.lr": {"low": 1, "high": 2, "step": 3}}, "does not fit"),
        ({"model.lr": {"low": "x", "high": 2}}, "low must be a number"),
        ({"output": ["a", "b"]}, "cannot search output"),
    ],
)
def test_a_space_that_is_none_is_refused(space: Any, said: str) -> None:
    with pytest.raises(SweepError, match=said):
        read_space(space)


def test_settings_become_options() -> None:
    space = read_space({"--model.init_args.lr": {"low": "1e-4", "high": 1}})
    assert space == {"model.lr": Range(1e-4, 1)}
    assert option("data.known", True) == "--data.known=true"
    assert option("model.lr", 1e-05) == "--model.lr=1e-05"


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("score", "maximize"),
        ("after_10/rewrite/gen_em", "maximize"),
        ("locality/other_relation/kl", "minimize"),
        ("locality/kl/p95", "minimize"),
        ("forget/rewrite/tf_all", "minimize"),
        ("timing/edit_seconds", "minimize"),
    ],
)
def test_a_score_knows_its_direction(name: str, direction: str) -> None:
    assert direction_of(name) == direction


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("final/rewrite/gen_me", "final/rewrite/gen_em"),
        ("rewite/tf_all", "rewrite/tf_all"),
        ("scor", "score"),
        ("tf_all", "rewrite, rephrase and locality"),
    ],
)
def test_an_unknown_score_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(SweepError, match=near):
        direction_of(name)


def test_a_partial_value_waits_for_what_it_needs() -> None:
    assert partial_value("final/rewrite/tf_all", {"rewrite/tf_all": 1.0}) is None
    assert partial_value("rewrite/tf_all", {"rewrite/tf_all": 0.5}) == 0.5
    assert partial_value("rewrite/tf_all", {"rewrite/tf_all": float("nan")}) is None
    assert partial_value("score", {"rewrite/tf_all": 1.0, "locality/known": 0.5}) == pytest.approx(
        2 / 3
    )
