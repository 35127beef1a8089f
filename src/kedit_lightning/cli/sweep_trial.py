"""A run of ``kedit test`` in this process, as a trial of a sweep is one."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer

from kedit_lightning.analysis.search_space import option
from kedit_lightning.analysis.sweep_objective import partial_value, value_of_run
from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.benchmark import EditCallback
from kedit_lightning.benchmark.run_context import new_metrics
from kedit_lightning.cli.parser import KEditCLI, cli_arguments
from kedit_lightning.cli.sweep_plan import SweepPlan
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.edits import Edit
from kedit_lightning.errors import SweepError
from kedit_lightning.methods.method import as_edit_method
from kedit_lightning.metrics import ExampleRecord

#: Parts of a config that numbers depend on; paths differ between machines.
_ASKED = ("model", "data", "seed_everything", "trainer.protocol")


class BuiltTest(KEditCLI):
    """``kedit test`` with its objects built, and not run."""

    def test(self, **arguments: Any) -> None:
        """Keep what the trainer's method would be called with."""
        self.arguments = arguments


class PartialScores(EditCallback):
    """Reports the score of what has been scored so far.

    Args:
        name: The score.
        every: Scored records between two reports.
        report: Takes the number of records scored, and their score.
    """

    def __init__(self, name: str, every: int, report: Callable[[int, float], None]) -> None:
        self.name, self.every, self.report = name, every, report

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with nothing scored."""
        run = as_edit_method(pl_module).run
        self._count, self._metrics = 0, new_metrics(run.protocol, run.seed)

    def on_example_result(
        self, trainer: Trainer, method: LightningModule, record: ExampleRecord, edit: Edit | None
    ) -> None:
        """Count a record, and report after every few."""
        self._count += 1
        self._metrics.update(record)
        if self._count % self.every == 0:
            value = partial_value(self.name, self._metrics.compute())
            if value is not None:
                self.report(self._count, value)


class TrialRunner:
    """Runs trials of a plan, with one base model for all of them.

    Args:
        plan: What the sweep does.
    """

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        self._base: tuple[BaseModelSpec, BaseModel] | None = None

    def check(self) -> dict[str, str]:
        """Build a trial with the first value of every setting, and load its base model.

        Returns:
            What the numbers of all trials depend on, by the path of the setting.

        Raises:
            KEditError: A setting is unknown, or a file is absent.
        """
        first = {name: part.first for name, part in self.plan.space.items()}
        built = self._built(first, self.plan.output / "trials" / "first")
        built.datamodule.examples()
        _ = self._loaded(built.model).fingerprint
        config = built.config["test"].clone(with_meta=False).as_dict()
        flat = dict(pair for name in _ASKED for pair in _flat(config, name))
        searched = tuple(f"{name}." for name in self.plan.space)
        return {
            name: str(value)
            for name, value in flat.items()
            if not f"{name}.".startswith(searched) and not name.endswith("path")
        }

    def measure(
        self, number: int, chosen: Mapping[str, Any], report: Callable[[int, float], None]
    ) -> tuple[float, str]:
        """Run a trial, and give its score and its complete config."""
        folder = self.plan.output / "trials" / f"{number:04d}"
        shutil.rmtree(folder, ignore_errors=True)  # of a storage that is no more
        built = self._built(chosen, folder)
        base = self._loaded(built.model)
        trainer: Any = built.trainer
        trainer.callbacks.append(PartialScores(self.plan.objective, self.plan.every, report))
        with base.edits.restored():
            trainer.test(**{**built.arguments, "verbose": False})
        return value_of_run(self.plan.objective, folder), _reusable(folder / "config.yaml")

    def _built(self, chosen: Mapping[str, Any], folder: Path) -> BuiltTest:
        given = [option(name, value) for name, value in chosen.items()]
        built = built_test([*self.plan.test_arguments, *given, f"--output={folder}"])
        kinds: Any = import_module("kedit_lightning.callbacks")
        # A sweep asks for numbers; the best edits are computed again where they are wanted.
        trainer: Any = built.trainer
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, kinds.EditSaver)]
        if trainer.world_size > 1:
            raise SweepError(
                "a worker of a sweep computes on one device; start several workers on the same "
                "storage instead of several devices in one"
            )
        self._take_split(built.datamodule)
        return built

    def _take_split(self, data: Any) -> None:
        """Let the test of a trial read the split that settings are chosen on."""
        if self.plan.split == "test":
            return
        path = data.split_path("validation") if isinstance(data, EditDataModule) else None
        if path is None:
            raise SweepError(
                f"{type(data).__name__} has no validation split, on which settings are chosen: set "
                "val_path (--data.val_path FILE), or let the sweep see the test split with "
                "split: test (--split test)"
            )
        data.path = path

    def _loaded(self, method: Any) -> BaseModel:
        """The base model of a method, the one of earlier trials where it is the same."""
        named = method._base_model
        spec = BaseModelSpec(named) if isinstance(named, str) else named
        if self._base is None or self._base[0] != spec:
            self._base = None  # two may not fit beside each other
            self._base = replace(spec), BaseModel.load(spec)
        method._base_model = self._base[1]
        return self._base[1]


def built_test(arguments: Sequence[str]) -> BuiltTest:
    """``kedit test`` with arguments, its objects built.

    Raises:
        KEditError: An argument does not fit.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        return BuiltTest(**cli_arguments(["test", *arguments], True))


def _reusable(path: Path) -> str:
    """A run's config without its output folder, for ``kedit test -c``."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["output"] = None
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)


def _flat(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Settings below a path of a config, by their paths on the command line."""
    value: Any = config
    for name in path.split("."):
        value = value[name]
    if not isinstance(value, Mapping):
        yield path, value
        return
    for name in value:
        # Options leave `init_args` out.
        for inner, found in _flat(value, str(name)):
            yield (
                path if inner == "init_args" else f"{path}.{inner.removeprefix('init_args.')}",
                found,
            )
