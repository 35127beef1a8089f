"""A sweep's file: what is searched, what is improved, and how much may be tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from kedit_lightning.analysis.search_space import Choice, Range, read_space
from kedit_lightning.analysis.sweep_objective import Direction, check_direction
from kedit_lightning.analysis.sweep_storage import Budget, Pruner, Sampler
from kedit_lightning.cli.base_model_arguments import options_of
from kedit_lightning.cli.config_arguments import read_yaml
from kedit_lightning.cli.messages import UsageError, meant
from kedit_lightning.errors import DataFileNotFoundError, SweepError

Split: TypeAlias = Literal["validation", "test"]
_CHOICES: dict[str, Any] = {"split": Split, "pruner": Pruner, "sampler": Sampler}
#: Numbers, with the lowest that each may be.
_NUMBERS = {"trials": 1, "seed": 0, "every": 1, "startup": 1, "heartbeat": 1, "retries": 0}


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep does.

    Args:
        space: Settings by their path, and what they may be.
        objective: The score, by its name in results.json, or ``score``.
        direction: Which way it is better.
        study: Name of the study in its storage.
        output: Folder of trials, table, figure and the best config.
        storage: The storage, as SQLAlchemy names it.
        config: Configs of every trial.
        arguments: Options of ``kedit test`` for every trial.
        split: The split of the data that trials edit and score.
        every: Scored records between two reports to the pruner.
        budget: How it searches.
    """

    space: Mapping[str, Range | Choice]
    objective: str
    direction: Direction
    study: str
    output: Path
    storage: str
    config: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    split: Split = "validation"
    every: int = 10
    budget: Budget = field(default_factory=Budget)

    @property
    def test_arguments(self) -> list[str]:
        """Arguments of ``kedit test`` that all trials share."""
        configs = [word for name in self.config for word in ("-c", name)]
        return [*configs, *self.arguments]

    def asked(self) -> dict[str, str]:
        """What must be the same in every call, as texts."""
        space = {f"space.{name}": str(_shown(part)) for name, part in self.space.items()}
        return {
            **space,
            "objective": self.objective,
            "direction": self.direction,
            "split": self.split,
            "seed": str(self.budget.seed),
        }


def read_plan(arguments: Sequence[str], usage: str) -> SweepPlan:
    """The plan of a command line: a file, options of the sweep, and options of every trial.

    Raises:
        UsageError: The arguments do not fit.
        DataFileNotFoundError: There is no such file.
        SweepError: The file has something that no sweep knows, or lacks what each needs.
    """
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"a sweep needs a YAML file as its first argument; usage: {usage}")
    path = Path(arguments[0]).expanduser()
    values = _file(path)
    known = {f.name for kind in (SweepPlan, Budget) for f in fields(kind)} - {"budget", "arguments"}
    for name in values:
        if name not in known:
            raise SweepError(f"{path}: a sweep has no '{name}'{meant(str(name), known)}")
    rest: list[str] = []
    for given, value, words in options_of(arguments[1:]):
        name = given.removeprefix("--")
        if given in ("-c", "--config"):
            values["config"] = [*_names(values.get("config")), value]
        elif given.startswith("--") and name in known - {"space"}:
            if not value:
                raise UsageError(f"{given} needs a value; usage: {usage}")
            values[name] = value
        elif name in ("resume", "trainer.devices", "trainer.num_nodes"):
            raise UsageError(
                f"a sweep has no {given}: each worker computes on one device, several workers "
                "share one storage, and the same command again continues the sweep"
            )
        elif not given.startswith("-"):
            raise UsageError(f"'{given}' is no option of a sweep or of a test; usage: {usage}")
        else:
            rest += words
    return _plan(path, values, rest)


def _plan(path: Path, values: dict[str, Any], arguments: Sequence[str]) -> SweepPlan:
    space = read_space(values.get("space"))
    objective = values.get("objective")
    if not isinstance(objective, str):
        raise SweepError(
            f"{path} has no objective: name a score of results.json, such as objective: "
            "rewrite/tf_all, or 'score' for the harmonic mean of rewrite, rephrase and locality"
        )
    direction = check_direction(values.get("direction"), objective)
    for name, kind in _CHOICES.items():
        if name in values and values[name] not in get_args(kind):
            known = ", ".join(get_args(kind))
            raise SweepError(f"{name} must be one of {known}, got {values[name]!r}")
    numbers: dict[str, Any] = {
        name: _number(name, values[name], low) for name, low in _NUMBERS.items() if name in values
    }
    study = str(values.get("study") or path.stem)
    output = Path(str(values.get("output") or f"sweeps/{study}")).expanduser()
    own = {f.name for f in fields(Budget)}
    texts = {n: values[n] for n in ("sampler", "pruner") if n in values}
    return SweepPlan(
        space,
        objective,
        direction,
        study,
        output,
        str(values.get("storage") or f"sqlite:///{output / 'sweep.db'}"),
        tuple(_names(values.get("config"))),
        tuple(arguments),
        values.get("split", "validation"),
        numbers.get("every", 10),
        Budget(**(texts | {n: v for n, v in numbers.items() if n in own})),
    )


def _file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataFileNotFoundError(
            f"there is no sweep file '{path}'; `kedit sweep --help` shows what stands in one"
        )
    values = read_yaml(path, "sweep file")
    if not isinstance(values, dict):
        raise SweepError(f"{path} must be a mapping with space and objective, got {values!r}")
    return values


def _names(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SweepError(f"config must be the name of a config, or a list of them, got {value!r}")
    return names


def _number(name: str, value: Any, low: int) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.removeprefix("-").isdigit() or int(text) < low:
        raise SweepError(f"{name} must be a whole number of at least {low}, got {value!r}")
    return int(text)


def _shown(part: Range | Choice) -> Any:
    """A range or choice as a file has it."""
    if isinstance(part, Choice):
        return list(part.values)
    plain = {f.name: f.default for f in fields(part) if f.default is not MISSING}
    return {name: value for name, value in asdict(part).items() if plain.get(name, ...) != value}
