"""The settings that a sweep searches, and what they may be."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from kedit_lightning.errors import SweepError

_FIELDS = ("low", "high", "log", "step")
#: Of a command's settings, those that a sweep gives itself.
_OWN = ("output", "resume", "config", "seed_everything", "trainer.devices", "trainer.num_nodes")


class Chooser(Protocol):
    """What chooses values: a trial of Optuna."""

    def suggest_float(
        self, name: str, low: float, high: float, /, *, step: float | None, log: bool
    ) -> float:
        """A number between bounds."""

    def suggest_int(self, name: str, low: int, high: int, /, *, step: int, log: bool) -> int:
        """A whole number between bounds."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of several values."""


@dataclass(frozen=True)
class Range:
    """Numbers between bounds, both included; whole ones where the bounds are.

    Args:
        low: The lowest.
        high: The highest.
        log: Choose by order of magnitude, so that 0.001 to 0.01 is as likely as 0.01 to 0.1.
        step: Distance between neighbours; any number between the bounds without it.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether its numbers are whole."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    @property
    def first(self) -> Any:
        """Its lowest number."""
        return self.low

    def chosen(self, name: str, chooser: Chooser) -> Any:
        """A number, as a trial chooses it."""
        if self.is_whole:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return chooser.suggest_int(name, low, high, step=step, log=self.log)
        return chooser.suggest_float(name, self.low, self.high, step=self.step, log=self.log)


@dataclass(frozen=True)
class Choice:
    """Values to choose from, in no order.

    Args:
        values: Numbers, texts, lists or mappings.
    """

    values: tuple[Any, ...]

    @property
    def first(self) -> Any:
        """The value that stands first."""
        return self.values[0]

    def chosen(self, name: str, chooser: Chooser) -> Any:
        """A value, as a trial chooses it."""
        named = {_stored(value): value for value in self.values}
        return named[chooser.suggest_categorical(name, list(named))]


SearchSpace: TypeAlias = Mapping[str, Range | Choice]


def read_space(value: Any) -> dict[str, Range | Choice]:
    """The space that a sweep file describes: a setting's path, and its range or choices.

    >>> read_space({"model.lr": {"low": "1e-4", "high": 0.1, "log": True}, "model.steps": [5, 10]})
    {'model.lr': Range(low=0.0001, high=0.1, log=True, step=None), 'model.steps': \
Choice(values=(5, 10))}

    Raises:
        SweepError: It is not such a description.
    """
    if not isinstance(value, Mapping) or not value:
        raise SweepError(
            "a sweep needs a space: for each setting a range such as "
            "model.lr: {low: 0.0001, high: 0.1, log: true}, or choices such as model.steps: "
            f"[5, 10, 25]; got {value!r}"
        )
    return {_path(name): _range_or_choice(str(name), given) for name, given in value.items()}


def option(path: str, value: Any) -> str:
    """A setting with its value as an option of the command.

    >>> option("model.layers", [1, 2]), option("model.prior", None), option("model", "ROME")
    ('--model.layers=[1, 2]', '--model.prior=null', '--model=ROME')
    """
    return f"--{path}={value if isinstance(value, str) else json.dumps(value)}"


def _path(name: Any) -> str:
    path = str(name).removeprefix("--").replace(".init_args", "")
    if path in _OWN:
        raise SweepError(f"a sweep cannot search {path}, which it gives to each trial itself")
    return path


def _range_or_choice(name: str, given: Any) -> Range | Choice:
    if isinstance(given, list):
        if not given or len(set(map(_stored, given))) < len(given):
            raise SweepError(f"space.{name} needs choices that differ, got {given!r}")
        return Choice(tuple(given))
    if not isinstance(given, Mapping):
        raise SweepError(
            f"space.{name} needs a range ({{low: 1, high: 10}}) or a list of choices, got {given!r}"
        )
    unknown = [str(field) for field in given if field not in _FIELDS]
    if unknown or "low" not in given or "high" not in given:
        raise SweepError(
            f"space.{name} needs low and high, and may have log and step"
            + (f"; it has {', '.join(unknown)}" if unknown else f", got {dict(given)!r}")
        )
    found = Range(
        _number(name, "low", given["low"]),
        _number(name, "high", given["high"]),
        bool(given.get("log", False)),
        None if given.get("step") is None else _number(name, "step", given["step"]),
    )
    _check(name, found)
    return found


def _check(name: str, found: Range) -> None:
    if not found.low < found.high:
        raise SweepError(f"space.{name}: low {found.low} must be below high {found.high}")
    if found.log and found.low <= 0:
        raise SweepError(f"space.{name}: with log the numbers must be above 0, got low {found.low}")
    if found.log and found.step is not None:
        raise SweepError(f"space.{name}: log and step exclude each other; leave one out")
    if found.step is not None and not 0 < found.step <= found.high - found.low:
        raise SweepError(f"space.{name}: step {found.step} does not fit between low and high")


def _number(name: str, field: str, value: Any) -> float:
    """A number; YAML reads 1e-4 as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SweepError(f"space.{name}: {field} must be a number")
    return value


def _stored(value: Any) -> Any:
    """A choice as Optuna stores it, which takes scalars only: a list or mapping by its text."""
    is_scalar = value is None or isinstance(value, bool | int | float | str)
    return value if is_scalar else json.dumps(value, default=str)
